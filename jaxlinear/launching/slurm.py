"""A run as a SLURM batch job: it requeues itself when it is preempted, its time is up or it failed, and then goes on."""

import re
from collections.abc import Mapping, Sequence

from jaxlinear.errors import UserError
from jaxlinear.exit_status import BAD_INPUT, PREEMPTED
from jaxlinear.launching.request import Request

# Options of --sbatch that replace a setting made here under another name.
_INSTEAD = {"mem-per-cpu": "mem", "mem-per-gpu": "mem", "oversubscribe": "exclusive"}


def render(
    request: Request,
    *,
    per: str = "device",
    minutes: int = 24 * 60,
    grace: int = 300,
    log: str = "slurm-%j.log",
    options: Mapping[str, str | None] | None = None,
    setup: Sequence[str] = (),
    cpus_per_task: int | None = None,
    restarts: int = 20,
) -> str:
    """The script for ``sbatch``.

    Args:
      request: for GPUs. On whole nodes it has all CPUs and all memory, unless ``options`` say otherwise.
      per: ``"device"`` for one process per GPU, ``"host"`` for one that has all GPUs of a node.
      minutes: the time limit.
      grace: seconds before the limit at which the processes are told to save themselves; less than the limit.
      log: where both output streams go.
      options: further ``#SBATCH`` options by name: account, partition, qos, ...; None for one without a value. They replace
        what is set here.
      setup: lines of shell before the run, such as ``module load``.
      cpus_per_task: CPUs of each process; by default the processes of a node share those that the job has there.
      restarts: how often a failure is followed by another start; preemptions do not count.
    """
    if request.platform != "gpu":
        raise UserError(f"SLURM runs on GPUs here, not on {request.target}; try --platform=tpu_vm, gke or local")
    tasks = {"device": request.chips_a_host, "host": 1}
    if per not in tasks:
        raise UserError(f"--processes_per={per!r} must be device or host")
    options = options or {}
    for name in options:
        if name == "no-requeue":
            raise UserError(
                "--sbatch=no-requeue: a preempted run must go back into the queue, which this option forbids"
            )
        if len(name) < 2:
            raise UserError(f"--sbatch={name}: give the option by its long name, such as --sbatch=partition=gpu")
    if grace >= 60 * minutes and not {"time", "signal"} & set(options):
        raise UserError(
            f"--grace={grace}: with --minutes={minutes} the run would be told to end as soon as it begins; --grace "
            f"must be less than {60 * minutes}"
        )
    settings: dict[str, str | None] = {
        "job-name": request.name,
        "nodes": str(request.hosts),
        "ntasks-per-node": str(tasks[per]),
        "gpus-per-node": str(request.chips_a_host),
    }
    if request.whole_hosts:
        settings |= {"exclusive": None, "mem": "0"}
    if cpus_per_task:
        settings["cpus-per-task"] = str(cpus_per_task)
    settings |= {
        "time": f"{minutes // 60:02}:{minutes % 60:02}:00",
        "signal": f"TERM@{grace}",
        "open-mode": "append",
        "output": log,
        "requeue": None,
    }
    for name in options:
        settings.pop(_INSTEAD.get(name, ""), None)
    settings |= options
    # srun uses what the job has of a node, but by default gives each process one CPU of it; since 22.05 it does not know
    # what sbatch was told.
    binding, cpus = " --cpu-bind=none", settings.get("cpus-per-task")
    if cpus:
        binding, setup = "", [f"export SRUN_CPUS_PER_TASK={cpus}", *setup]
    return f"""#!/bin/bash
{"".join(_option(*setting) for setting in settings.items())}
# Before the time is up every process gets SIGTERM, saves itself and ends with status {PREEMPTED}; the job goes
# back into the queue; after a preemption SLURM puts it there. The same command goes on from what was saved.
{"".join(f"{line}{chr(10)}" for line in setup)}srun --kill-on-bad-exit=0{binding} {request.line()}
status=$?

# SLURM's own count has preemptions too: each failure is a line here, until the job is done.
failures="{request.name}-$SLURM_JOB_ID.failures"
case "$status" in
  0)
    rm -f "$failures"
    exit 0
    ;;
  {PREEMPTED}) ;;
  {BAD_INPUT}) exit {BAD_INPUT} ;; # the next start would be refused as this one was
  *)
    echo "status $status" >> "$failures" || exit "$status"
    if [ "$(wc -l < "$failures")" -gt {restarts} ]; then
      echo "the run failed with status $status, after {restarts} restarts ($failures); sbatch this script to resume it" >&2
      exit "$status"
    fi
    ;;
esac
for pause in 15 30 60 60 60 0; do # the controller may be starting again
  scontrol requeue "$SLURM_JOB_ID" && exit "$status"
  sleep "$pause"
done
echo "SLURM did not take the job back into the queue; sbatch this script to resume it" >&2
exit "$status"
"""


def named(options: Sequence[str]) -> dict[str, str | None]:
    """Options of ``sbatch``, each ``NAME=VALUE`` or ``NAME``, by name; None for one without a value."""
    found: dict[str, str | None] = {}
    for option in options:
        name, equals, value = option.lstrip("-").partition("=")
        if name in found:
            raise UserError(f"--sbatch={option}: {name} is given twice, and sbatch takes only the last; leave one out")
        found[name] = value if equals else None
    return found


def _option(name: str, value: str | None) -> str:
    """A line of ``sbatch``, which ends a value at a blank or # unless it is quoted."""
    if value is None:
        return f"#SBATCH --{name}\n"
    if re.search(r'["\r\n]', value):
        raise UserError(f"#SBATCH --{name}: {value!r} has a line break or a double quote, which sbatch does not take")
    return f'#SBATCH --{name}="{value}"\n' if re.search(r"[\s#']", value) else f"#SBATCH --{name}={value}\n"
