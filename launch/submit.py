"""Starts a training run on many devices.

    python launch/submit.py --platform=slurm --target=h100:16 --partition=gpu -- --config=configs/NAME.py --workdir=DIR ...
    python launch/submit.py --platform=gke --target=v5e:4x8 --image=IMAGE --mount=gs://BUCKET:/runs -- ... --workdir=/runs/A
    python launch/submit.py --platform=tpu_vm --target=v5p:4x4x4 --zone=Z --project=P --setup=SHELL -- --config=... ...
    python launch/submit.py --platform=local --processes=2 --target=cpu:2 -- --config=configs/NAME.py --workdir=DIR ...

The options after -- are those of launch/train.py. This program checks that their config file and keys exist; the run
checks the values when it begins. The script or manifest is then written (to --output or stdout) or, with --submit, handed
to the scheduler. Every platform restarts the run after a preemption (local with --requeue), and all but local after a
failure; the run resumes from what it saved. Its processes stop at once unless together they see the requested devices.
"""

import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags

from jaxlinear import cli, cli_flags
from jaxlinear.errors import UserError
from jaxlinear.launching import gke, local, request, slurm, tpu_vm

_PLATFORM = flags.DEFINE_enum(
    "platform", None, ["slurm", "gke", "tpu_vm", "local"], "What starts the run.", required=True
)
_TARGET = flags.DEFINE_string(
    "target",
    None,
    "Devices: v5e:4x8 (or v5p, v6e, tpu7x), 2xv5e:4x8, h100:16 (or h200, a100, gpu, cpu).",
    required=True,
)
_NAME = flags.DEFINE_string("name", None, "Not local: name of the job; by default that of the work directory.")
_OUTPUT = flags.DEFINE_string("output", None, "Not local: write the script or manifest to this file.")
_SUBMIT = flags.DEFINE_bool("submit", False, "slurm, gke: hand it to the scheduler with sbatch or kubectl.")
_PYTHON = flags.DEFINE_string(
    "python", None, "Python interpreter of the run; by default python or, with local, this one."
)
_DEVICES_A_HOST = flags.DEFINE_integer(
    "devices_a_host", None, "Devices per host if not 8 GPUs or 4 TPU chips.", lower_bound=1
)
_GRACE = flags.DEFINE_integer(
    "grace", None, "slurm, gke: seconds for the run to save itself; by default 300, with --spot 15.", lower_bound=1
)
_RESTARTS = flags.DEFINE_integer(
    "restarts", 20, "Not local: restarts after failures; preemptions do not count.", lower_bound=0
)
_SPOT = flags.DEFINE_bool("spot", False, "gke, tpu_vm: use machines that may be preempted.")

_PROCESSES_PER = flags.DEFINE_enum(
    "processes_per", "device", ["device", "host"], "slurm: one process per GPU, or per node."
)
_PARTITION = flags.DEFINE_string("partition", None, "slurm: the partition.")
_ACCOUNT = flags.DEFINE_string("account", None, "slurm: the account to charge.")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "slurm: another option, NAME or NAME=VALUE.")
_CPUS_PER_TASK = flags.DEFINE_integer("cpus_per_task", None, "slurm: CPUs per process.", lower_bound=1)
_MINUTES = flags.DEFINE_integer("minutes", 24 * 60, "slurm: time limit in minutes.", lower_bound=1)
_LOG = flags.DEFINE_string("log", "slurm-%j.log", "slurm: file for the output.")
_SHELL = flags.DEFINE_multi_string("shell", [], "slurm: a line of shell before the run.")

_IMAGE = flags.DEFINE_string("image", None, "gke: container image with this project in its working directory.")
_MOUNT = flags.DEFINE_multi_string("mount", [], "gke: mount gs://BUCKET:/PATH or CLAIM:/PATH in every pod.")
_SERVICE_ACCOUNT = flags.DEFINE_string(
    "service_account", None, "gke: Kubernetes service account that may use the buckets."
)
_QUEUE = flags.DEFINE_string("queue", None, "gke: Kueue queue in which the job waits.")

_ZONE = flags.DEFINE_string("zone", None, "tpu_vm: Google Cloud zone.")
_PROJECT = flags.DEFINE_string("project", None, "tpu_vm: Google Cloud project to charge.")
_SETUP = flags.DEFINE_string("setup", None, "tpu_vm: shell that installs this project in --directory on every host.")
_DIRECTORY = flags.DEFINE_string("directory", "jaxlinear", "tpu_vm: directory in which the training command runs.")
_DELETE_WHEN_DONE = flags.DEFINE_bool("delete_when_done", False, "tpu_vm: delete the slice when the run is finished.")

_PROCESSES = flags.DEFINE_integer("processes", 1, "local: number of processes.", lower_bound=1)
_REQUEUE = flags.DEFINE_bool("requeue", False, "local: restart after a preemption.")

# The platforms that read each flag; the other flags are for all of them.
_READ_BY: tuple[tuple[tuple[str, ...], tuple[flags.FlagHolder, ...]], ...] = (
    (("slurm", "gke", "tpu_vm"), (_NAME, _OUTPUT, _RESTARTS)),
    (("slurm", "gke"), (_SUBMIT, _GRACE)),
    (("gke", "tpu_vm"), (_SPOT,)),
    (("slurm",), (_PROCESSES_PER, _PARTITION, _ACCOUNT, _SBATCH, _CPUS_PER_TASK, _MINUTES, _LOG, _SHELL)),
    (("gke",), (_IMAGE, _MOUNT, _SERVICE_ACCOUNT, _QUEUE)),
    (("tpu_vm",), (_ZONE, _PROJECT, _SETUP, _DIRECTORY, _DELETE_WHEN_DONE)),
    (("local",), (_PROCESSES, _REQUEUE)),
)


def main(arguments: list[str]) -> int:
    for platforms, read in _READ_BY:
        given = [flag.name for flag in read if flag.present]
        if given and _PLATFORM.value not in platforms:
            raise UserError(
                f"--{given[0]} is for --platform={' or '.join(platforms)}; {_PLATFORM.value} does not use it"
            )
    cli.check_output("output", _OUTPUT.value)
    cli_flags.check_config_options(arguments)
    request.check_flags(arguments)
    python = _PYTHON.value or (sys.executable if _PLATFORM.value == "local" else "python")
    asked = request.make(_TARGET.value, _NAME.value, arguments, python=python, on_a_host=_DEVICES_A_HOST.value)
    cli.check_path("workdir", asked.workdir)
    cli.check_path("python", python)
    if _PLATFORM.value == "local":
        return local.run(asked, processes=_PROCESSES.value, requeue=_REQUEUE.value)
    text, suffix = _render(asked)
    file = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
    if file:
        file.write_text(text, encoding="utf-8")
    elif not _SUBMIT.value:
        print(text, end="")
    if not _SUBMIT.value:
        return 0
    program = {"slurm": ["sbatch"], "gke": ["kubectl", "apply", "-f"]}[_PLATFORM.value]
    with tempfile.TemporaryDirectory() as directory:
        if file is None:
            file = pathlib.Path(directory) / f"{asked.name}{suffix}"
            file.write_text(text, encoding="utf-8")
        try:
            return subprocess.run([*program, str(file)], check=False).returncode
        except FileNotFoundError:
            raise UserError(
                f"{program[0]} is not installed on this machine; without --submit, what it would be given is printed"
            ) from None


def _render(asked: request.Request) -> tuple[str, str]:
    """What the scheduler is given, and the suffix of its file."""
    if _PLATFORM.value == "slurm":
        own = [f"{flag.name}={flag.value}" for flag in (_PARTITION, _ACCOUNT) if flag.value]
        options = {"options": slurm.named([*own, *_SBATCH.value]), "grace": _GRACE.value or 300}
        options |= {"per": _PROCESSES_PER.value, "setup": _SHELL.value}
        return slurm.render(asked, **options, **_named(_MINUTES, _LOG, _CPUS_PER_TASK, _RESTARTS)), ".sh"
    if _PLATFORM.value == "gke":
        options = _named(_IMAGE, _SERVICE_ACCOUNT, _RESTARTS, _GRACE, _SPOT, _QUEUE)
        return gke.render(asked, mounts=_MOUNT.value, **options), ".yaml"
    options = _named(_ZONE, _PROJECT, _SETUP, _DIRECTORY, _SPOT, _RESTARTS, _DELETE_WHEN_DONE)
    return tpu_vm.render(asked, **options), ".sh"


def _named(*read: flags.FlagHolder) -> dict[str, Any]:
    """Arguments with the names of their flags."""
    return {flag.name: flag.value for flag in read}


if __name__ == "__main__":
    cli.run(main, takes_arguments=True)
