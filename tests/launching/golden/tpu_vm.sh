#!/bin/bash
# Asks for a v5p slice of 4x4x4, trains on it, and asks again when it is taken away. The same
# command goes on from what was saved: the work directory must be on a file system that outlives the slice, and is the same
# on all hosts. A run goes on without this script; started again, the script follows it.

name=griffin-96db98 # the end is the work directory's mark
where=(--zone=us-east5-a --project=mine)
asked=(--node-id=griffin-96db98 --type=v5p --topology=4x4x4 --runtime-version=v2-alpha-tpuv5 --spot)
restarts=20
delete_when_done=false
preempted=75 bad_input=2 # statuses of the run

# On each host, before the run; not beside one to which the connection was lost.
setup() {
  cat <<'END'
flock -n ~/griffin-96db98.lock true || exit 0
test -d jaxlinear || git clone -q /shared/jaxlinear; cd jaxlinear && pip install -q '.[tpu]'
END
}

# On each host: the run.
train() {
  cat <<'END'
run=~/griffin-96db98
directory=jaxlinear
preempted=75
training() { python launch/train.py --config=configs/griffin_100m.py --workdir=/shared/runs/griffin --config.model.pattern=rg_lru,gla --expect=tpu:64; }

# Starts the run on this host if there is none, and follows what it writes until it ends. launch/submit.py wrote what is
# above: where that is ($run.log, with other files beside it), where the run starts, and training, its command.
cd "$directory" || exit 3
: >> "$run.log"
exec 9>> "$run.lock"
if flock -n 9; then
  rm -f "$run.status"
  (
    trap "" HUP        # the connection is lost
    trap told=yes TERM # the machine is taken away: the run saves itself, and is not started here again
    status=$preempted told=no
    while [ "$status $told" = "$preempted no" ]; do
      training 9>&-
      status=$?
    done
    echo "$status" > "$run.status"
    sleep 2 # what follows the run has read its last words then
  ) < /dev/null >> "$run.log" 2>&1 &
  echo $! > "$run.pid"
fi
exec 9>&-
tail -n 20 -f --pid="$(cat "$run.pid")" "$run.log"
status=$(cat "$run.status" || echo 137)
[ "$status" -eq 1 ] && status=101 # 1 is gcloud's own
exit "$status"
END
}

# launch/submit.py wrote what is above: what is asked for, and setup and train, which print what a host is told to do.
set -u

queued() { gcloud --quiet compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

on_all() {
  gcloud --quiet compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --ssh-flag=-oServerAliveInterval=60 \
    --command="$1" < /dev/null
}

# NONE if there is no such slice, UNKNOWN if gcloud could not find out, as when the network is gone.
state() {
  local errors
  { errors=$(queued describe --format='value(state.state)' 2>&1 >&3); } 3>&1 && return
  case "$errors" in
    *NOT_FOUND*) echo NONE ;;
    *) echo "$errors" >&2; echo UNKNOWN ;;
  esac
}

# Tries again after a pause, which grows to five minutes; so many in a row are the end.
again() {
  echo "$name: $2 ($1 in a row, at most $restarts)" >&2
  [ "$1" -le "$restarts" ] || exit 1
  sleep $(($1 < 5 ? 60 * $1 : 300))
}
refusals=0 unknown=0
refused() { refusals=$((refusals + 1)); again "$refusals" "$1"; }

command -v gcloud >/dev/null || { echo "gcloud is not on this machine" >&2; exit 1; }
trap 'echo "$name: a slice that is still there is paid for; this deletes it:" \
  "gcloud compute tpus queued-resources delete $name ${where[*]} --force" >&2' EXIT
trap 'exit 130' INT # gcloud ends with 1 then

failures=0
while true; do
  state=$(state)
  [ "$state" = UNKNOWN ] || unknown=0
  case "$state" in
    UNKNOWN) # the network, or who is logged in no longer may ask
      unknown=$((unknown + 1))
      again "$unknown" "gcloud could not find out the state of the slice"
      continue
      ;;
    NONE) queued create "${asked[@]}" || refused "the slice was refused" ;;
    SUSPENDED) queued delete --force || refused "it could not be deleted" ;;
    FAILED) queued delete --force; refused "the request for the slice failed" ;;
    ACTIVE)
      on_all "$(setup)" || { refused "the hosts could not be set up"; continue; }
      refusals=0
      on_all "$(train)"
      status=$?
      case "$status" in
        0)
          if [ "$delete_when_done" = true ]; then
            until queued delete --force; do refused "it could not be deleted"; done
            trap - EXIT
          fi
          exit 0
          ;;
        "$bad_input") exit "$status" ;; # the next start would be refused as this one was
      esac
      # A slice that is gone is no failure of the run, and its state says so a while later. Nor is a connection that is
      # lost (ssh ends with 255, gcloud with 1).
      sleep 60
      case "$status" in 1 | 255 | "$preempted") continue ;; esac
      if [ "$(state)" = ACTIVE ]; then
        failures=$((failures + 1))
        echo "$name: the run failed with status $status ($failures times, at most $restarts)" >&2
        [ "$failures" -le "$restarts" ] || exit "$status"
      fi
      continue
      ;;
  esac
  sleep 30
done
