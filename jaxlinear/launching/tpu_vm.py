"""A run on the TPU VMs of a slice: a shell script that asks for the slice, starts a process on each host, and begins again
when the slice is taken away."""

import shlex

from jaxlinear.errors import UserError
from jaxlinear.launching.request import PREEMPTED, Request

# What gcloud calls them, and the software of their hosts (cloud.google.com/tpu/docs/runtimes).
_TYPES = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}


def render(
    request: Request, *, zone: str, project: str, setup: str, directory: str = "jaxlinear", spot: bool = False
) -> str:
    """The script, to be left running where ``gcloud`` is.

    Args:
      request: of a TPU slice.
      zone, project: of Google Cloud.
      setup: shell that makes this project, with its environment, in ``directory`` of every host.
      directory: where the training command runs.
      spot: of slices that may be taken away at any time.
    """
    if request.platform != "tpu":
        raise UserError(f"--platform=tpu_vm is for TPUs, not for {request.target}; slurm and gke have GPUs")
    missing = [name for name, value in (("zone", zone), ("project", project), ("setup", setup)) if not value]
    if missing:
        raise UserError(f"--platform=tpu_vm needs --{missing[0]}")
    # By its shape: --accelerator-type names only how many chips, and gcloud then takes the shape that it likes.
    asked = f"--node-id={request.name} --type={_TYPES[request.kind]} --topology={request.shape}"
    asked += f" --runtime-version={_RUNTIMES[request.kind]}" + (" --spot" if spot else "")
    where = f"--zone={shlex.quote(zone)} --project={shlex.quote(project)}"
    # Processes that have saved themselves begin again together.
    loop = f'until {request.line()}; do status=$?; [ "$status" -eq {PREEMPTED} ] || exit "$status"; done'
    train = f"cd {shlex.quote(directory)} && {loop}"
    return f"""#!/bin/bash
# Asks for a {request.kind} slice of {request.shape}, trains on it, and asks again when it is taken away. The same
# command goes on from what was saved: the work directory must be on a file system that outlives the slice, and is the same
# on all hosts.
set -u

name={request.name}
gcloud="gcloud --quiet"

command -v gcloud >/dev/null || {{ echo "gcloud is not on this machine" >&2; exit 1; }}

# NONE if there is no such slice, UNKNOWN if gcloud could not find out, as when the network is gone.
state() {{
  local errors describe="$gcloud compute tpus queued-resources describe"
  {{ errors=$($describe "$name" {where} --format='value(state.state)' 2>&1 >&3); }} 3>&1 && return
  case "$errors" in
    *NOT_FOUND*) echo NONE ;;
    *) echo "$errors" >&2; echo UNKNOWN ;;
  esac
}}

on_all() {{
  $gcloud compute tpus tpu-vm ssh "$name" {where} --worker=all --command="$1"
}}

while true; do
  case "$(state)" in
    NONE) $gcloud compute tpus queued-resources create "$name" {where} {asked} || exit 1 ;;
    SUSPENDED | FAILED) $gcloud compute tpus queued-resources delete "$name" {where} --force || exit 1 ;;
    ACTIVE)
      on_all {shlex.quote(setup)} && on_all {shlex.quote(train)} && exit 0
      status=$?
      # A slice that is gone is no failure of the run; ssh ends with 255 then, a while before the state says so.
      [ "$status" -eq 255 ] && sleep 60
      [ "$(state)" = ACTIVE ] && exit "$status"
      ;;
  esac
  sleep 30
done
"""
