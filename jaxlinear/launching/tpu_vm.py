"""A run on the TPU VMs of a slice: a shell script that asks for the slice, starts one process per host, and begins again
when the slice is taken away."""

import hashlib
import re
import shlex

from jaxlinear.errors import UserError
from jaxlinear.exit_status import BAD_INPUT, PREEMPTED
from jaxlinear.launching.request import Request

# gcloud's names for them, and the software of their hosts (cloud.google.com/tpu/docs/runtimes).
_TYPES = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}

_FINISHED = {
    False: "exit 0",
    True: """until queued delete --force; do refused "it could not be deleted"; done
          trap - EXIT
          exit 0""",
}


def render(
    request: Request,
    *,
    zone: str,
    project: str,
    setup: str,
    directory: str = "jaxlinear",
    spot: bool = False,
    restarts: int = 20,
    delete_when_done: bool = False,
) -> str:
    """The script, to be left running on a machine with ``gcloud``.

    Args:
      request: for a TPU slice.
      zone, project: of Google Cloud.
      setup: shell commands that set up this project, with its environment, in ``directory`` of every host.
      directory: where the training command runs.
      spot: whether to ask for slices that may be taken away at any time.
      restarts: how often a failure of the run is followed by another start, where preemptions do not count; and how often
        in a row Google Cloud may refuse something or be out of reach.
      delete_when_done: whether to delete the slice when the run is finished; else this is left to the reader of the
        script's last line.
    """
    if request.platform != "tpu":
        raise UserError(f"--platform=tpu_vm is for TPUs, not for {request.target}; slurm and gke have GPUs")
    if request.kind not in _TYPES:
        raise UserError(f"--platform=tpu_vm has {', '.join(_TYPES)}, not {request.target}; --platform=gke has it")
    if request.slices > 1:
        raise UserError(f"--platform=tpu_vm has one slice, not {request.target}; --platform=gke joins several")
    missing = [name for name, value in (("zone", zone), ("project", project), ("setup", setup)) if not value]
    if missing:
        raise UserError(f"--platform=tpu_vm needs --{missing[0]}")
    # Each host's shell starts in its home directory; quoted below, a ~ would be the name of a directory.
    directory = re.sub(r"^~(/+|$)", "", directory) or "."
    end = "END"
    while end in setup.splitlines():  # as when it has a here-document of its own
        end += "_"
    # Two runs whose work directories have the same name are two jobs: a slice of one job's name could be the other's.
    name = f"{request.name}-{hashlib.sha256(request.workdir.rstrip('/').encode()).hexdigest()[:6]}"
    # By shape: --accelerator-type gives only the number of chips, and gcloud then chooses any shape that it likes.
    asked = f"--node-id={name} --type={_TYPES[request.kind]} --topology={request.shape}"
    asked += f" --runtime-version={_RUNTIMES[request.kind]}" + (" --spot" if spot else "")
    return f"""#!/bin/bash
# Asks for a {request.kind} slice of {request.shape}, trains on it, and asks again when it is taken away. The same
# command goes on from what was saved: the work directory must be on a file system that outlives the slice, and is the same
# on all hosts. A run goes on without this script; started again, the script follows it.
set -u

name={name} # the end is the work directory's mark
where=(--zone={shlex.quote(zone)} --project={shlex.quote(project)})
restarts={restarts}

# On each host, before the run; not beside one to which the connection was lost.
setup() {{
  cat <<'{end}'
flock -n ~/{name}.lock true || exit 0
{setup}
{end}
}}

# On each host: starts the run if there is none, and follows what it writes until it ends.
train() {{
  cat <<'END'
run=~/{name}
cd {shlex.quote(directory)} || exit 3
: >> "$run.log"
exec 9>> "$run.lock"
if flock -n 9; then
  rm -f "$run.status"
  (
    trap "" HUP        # the connection is lost
    trap told=yes TERM # the machine is taken away: the run saves itself, and is not started here again
    status={PREEMPTED} told=no
    while [ "$status $told" = "{PREEMPTED} no" ]; do
      {request.line()} 9>&-
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
}}

queued() {{ gcloud --quiet compute tpus queued-resources "$1" "$name" "${{where[@]}}" "${{@:2}}"; }}

on_all() {{
  gcloud --quiet compute tpus tpu-vm ssh "$name" "${{where[@]}}" --worker=all --ssh-flag=-oServerAliveInterval=60 \\
    --command="$1" < /dev/null
}}

# NONE if there is no such slice, UNKNOWN if gcloud could not find out, as when the network is gone.
state() {{
  local errors
  {{ errors=$(queued describe --format='value(state.state)' 2>&1 >&3); }} 3>&1 && return
  case "$errors" in
    *NOT_FOUND*) echo NONE ;;
    *) echo "$errors" >&2; echo UNKNOWN ;;
  esac
}}

# Tries again after a pause, which grows to five minutes; so many in a row are the end.
again() {{
  echo "$name: $2 ($1 in a row, at most $restarts)" >&2
  [ "$1" -le "$restarts" ] || exit 1
  sleep $(($1 < 5 ? 60 * $1 : 300))
}}
refusals=0 unknown=0
refused() {{ refusals=$((refusals + 1)); again "$refusals" "$1"; }}

command -v gcloud >/dev/null || {{ echo "gcloud is not on this machine" >&2; exit 1; }}
trap 'echo "$name: a slice that is still there is paid for; this deletes it:" \\
  "gcloud compute tpus queued-resources delete $name ${{where[*]}} --force" >&2' EXIT
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
    NONE) queued create {asked} || refused "the slice was refused" ;;
    SUSPENDED) queued delete --force || refused "it could not be deleted" ;;
    FAILED) queued delete --force; refused "the request for the slice failed" ;;
    ACTIVE)
      on_all "$(setup)" || {{ refused "the hosts could not be set up"; continue; }}
      refusals=0
      on_all "$(train)"
      status=$?
      case "$status" in
        0)
          {_FINISHED[delete_when_done]}
          ;;
        {BAD_INPUT}) exit {BAD_INPUT} ;; # the next start would be refused as this one was
      esac
      # A slice that is gone is no failure of the run, and its state says so a while later. Nor is a connection that is
      # lost (ssh ends with 255, gcloud with 1).
      sleep 60
      case "$status" in 1 | 255 | {PREEMPTED}) continue ;; esac
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
"""
