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
