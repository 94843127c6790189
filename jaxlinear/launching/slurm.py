"""A run as a SLURM batch job: it requeues itself when it is preempted or its time is up, and goes on."""

import re
from collections.abc import Mapping, Sequence

from jaxlinear.errors import UserError
from jaxlinear.launching.request import PREEMPTED, Request


def render(
    request: Request,
    *,
    per: str = "device",
    minutes: int = 24 * 60,
    grace: int = 300,
    log: str = "slurm-%j.log",
    options: Mapping[str, str] | None = None,
    setup: Sequence[str] = (),
) -> str:
    """The script for ``sbatch``.

    Args:
      request: of GPUs.
      per: ``"device"`` for one process a GPU, ``"host"`` for one that has all of a node's.
      minutes: the time limit.
      grace: seconds before the limit at which the processes are told to save themselves; less than the limit.
      log: where both streams go.
      options: further ``#SBATCH`` options by name: account, partition, qos, ...
      setup: lines of shell before the run, such as ``module load``.
    """
    if request.platform != "gpu":
        raise UserError(f"SLURM runs on GPUs here, not on {request.target}; --platform=tpu_vm, gke or local may")
    tasks = {"device": request.on_a_host, "host": 1}
    if per not in tasks:
        raise UserError(f"--processes_per={per!r} can be device or host")
    options = options or {}
    if grace >= 60 * minutes and not {"time", "signal"} & set(options):
        raise UserError(
            f"--grace={grace}: with --minutes={minutes} the run would be told to end whenever it begins; "
            f"--grace must be less than {60 * minutes}"
        )
    settings = {
        "job-name": request.name,
        "nodes": str(request.hosts),
        "ntasks-per-node": str(tasks[per]),
        "gpus-per-node": str(request.on_a_host),
        "time": f"{minutes // 60:02}:{minutes % 60:02}:00",
        "signal": f"TERM@{grace}",
        "open-mode": "append",
        "output": log,
        **options,
    }
    lines = ["#!/bin/bash", *(_option(name, value) for name, value in settings.items()), "#SBATCH --requeue", ""]
    lines += [
        f"# Before the time is up every process gets SIGTERM, saves itself and ends with status {PREEMPTED}; the job goes",
        "# back into the queue; after a preemption SLURM puts it there. The same command goes on from what was saved.",
        *setup,
        f"srun --kill-on-bad-exit=0 {request.line()}",
        "status=$?",
        f'if [ "$status" -eq {PREEMPTED} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
        "",
    ]
    return "\n".join(lines)


def _option(name: str, value: str) -> str:
    """A line of ``sbatch``, which ends a value at a blank or # unless it is quoted."""
    if re.search(r'["\r\n]', value):
        raise UserError(f"#SBATCH --{name}: {value!r} has a line break or a double quote; sbatch takes it without")
    return f'#SBATCH --{name}="{value}"' if re.search(r"[\s#']", value) else f"#SBATCH --{name}={value}"
