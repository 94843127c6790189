"""Starts a training run on many devices.

    python launch/submit.py --platform=slurm --target=h100:16 --partition=gpu -- --config=configs/NAME.py --workdir=DIR ...
    python launch/submit.py --platform=gke --target=v5e:4x8 --image=IMAGE --mount=gs://BUCKET:/runs -- ... --workdir=/runs/A
    python launch/submit.py --platform=tpu_vm --target=v5p:4x4x4 --zone=Z --project=P --setup=SHELL -- --config=... ...
    python launch/submit.py --platform=local --processes=2 --target=cpu:2 -- --config=configs/NAME.py --workdir=DIR ...

What follows after -- is the command of launch/train.py. That its config file and the keys that it sets exist is checked
here, and their values when the run begins. Then a script or manifest is written (--output, or to stdout) or, with --submit,
handed to the scheduler. Every one starts the run again after a preemption, and all but local after a failure; it goes on
from what it saved. The processes go no further unless together they see the devices that were asked for.
"""

import pathlib
import subprocess
import sys
import tempfile

from absl import flags

from jaxlinear import cli, cli_flags
from jaxlinear.errors import UserError
from jaxlinear.launching import gke, local, request, slurm, tpu_vm

_PLATFORM = flags.DEFINE_enum("platform", None, ["slurm", "gke", "tpu_vm", "local"], "What starts it.", required=True)
_TARGET = flags.DEFINE_string(
    "target", None, "v5e:4x8 (v5p, v6e, tpu7x), 2xv5e:4x8, h100:16 (h200, a100, gpu, cpu).", required=True
)
_NAME = flags.DEFINE_string("name", None, "The job's name; by default that of the work directory; not local.")
_OUTPUT = flags.DEFINE_string("output", None, "Write the script or manifest to this file; not local.")
_SUBMIT = flags.DEFINE_bool("submit", False, "slurm, gke: hand it to the scheduler, by sbatch or kubectl.")
_PYTHON = flags.DEFINE_string("python", None, "The interpreter on the other machines; by default python, or this one.")
_DEVICES_A_HOST = flags.DEFINE_integer("devices_a_host", None, "Where it is not 8 GPUs or 4 TPU chips.", lower_bound=1)
_GRACE = flags.DEFINE_integer("grace", None, "slurm, gke: seconds to save itself; 300, gke --spot 15.", lower_bound=1)
_RESTARTS = flags.DEFINE_integer("restarts", 20, "Not local: starts after failures, not preemptions.", lower_bound=0)
_SPOT = flags.DEFINE_bool("spot", False, "gke, tpu_vm: on machines that may be taken away.")

_PROCESSES_PER = flags.DEFINE_enum(
    "processes_per", "device", ["device", "host"], "slurm: one process a GPU, or a node."
)
_PARTITION = flags.DEFINE_string("partition", None, "slurm: the partition.")
_ACCOUNT = flags.DEFINE_string("account", None, "slurm: the account that is charged.")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "slurm: another option, NAME or NAME=VALUE; may be given again.")
_CPUS_PER_TASK = flags.DEFINE_integer("cpus_per_task", None, "slurm: CPUs of each process.", lower_bound=1)
_MINUTES = flags.DEFINE_integer("minutes", 24 * 60, "slurm: the time limit.", lower_bound=1)
_LOG = flags.DEFINE_string("log", "slurm-%j.log", "slurm: where the output goes.")
_SHELL = flags.DEFINE_multi_string("shell", [], "slurm: a line of shell before the run; may be given again.")

_IMAGE = flags.DEFINE_string("image", None, "gke: a container with this project in its working directory.")
_MOUNT = flags.DEFINE_multi_string(
    "mount", [], "gke: gs://BUCKET:/PATH or CLAIM:/PATH in every pod; may be given again."
)
_SERVICE_ACCOUNT = flags.DEFINE_string("service_account", None, "gke: the Kubernetes account that may use the buckets.")
_QUEUE = flags.DEFINE_string("queue", None, "gke: the queue of Kueue in which the job waits.")

_ZONE = flags.DEFINE_string("zone", None, "tpu_vm: the zone of Google Cloud.")
_PROJECT = flags.DEFINE_string("project", None, "tpu_vm: the project of Google Cloud that pays.")
_SETUP = flags.DEFINE_string("setup", None, "tpu_vm: shell that installs this project in --directory of every host.")
_DIRECTORY = flags.DEFINE_string("directory", "jaxlinear", "tpu_vm: where the training command runs.")
_DELETE_WHEN_DONE = flags.DEFINE_bool("delete_when_done", False, "tpu_vm: delete the slice when the run is finished.")

_PROCESSES = flags.DEFINE_integer("processes", 1, "local: how many processes.", lower_bound=1)
_REQUEUE = flags.DEFINE_bool("requeue", False, "local: start again after a preemption.")

# Who reads what; the other flags are for all.
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
                f"--{given[0]} is for --platform={' or '.join(platforms)}; {_PLATFORM.value} has no use for it"
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
            raise UserError(f"{program[0]} is not on this machine; without --submit what it takes is printed") from None


def _render(asked: request.Request) -> tuple[str, str]:
    if _PLATFORM.value == "slurm":
        own = {"partition": _PARTITION.value, "account": _ACCOUNT.value}
        options = slurm.named([*(f"{name}={value}" for name, value in own.items() if value), *_SBATCH.value])
        script = slurm.render(
            asked,
            per=_PROCESSES_PER.value,
            minutes=_MINUTES.value,
            grace=_GRACE.value or 300,
            log=_LOG.value,
            options=options,
            setup=_SHELL.value,
            cpus_per_task=_CPUS_PER_TASK.value,
            restarts=_RESTARTS.value,
        )
        return script, ".sh"
    if _PLATFORM.value == "gke":
        manifest = gke.render(
            asked,
            image=_IMAGE.value,
            mounts=_MOUNT.value,
            service_account=_SERVICE_ACCOUNT.value,
            restarts=_RESTARTS.value,
            grace=_GRACE.value,
            spot=_SPOT.value,
            queue=_QUEUE.value,
        )
        return manifest, ".yaml"
    script = tpu_vm.render(
        asked,
        zone=_ZONE.value,
        project=_PROJECT.value,
        setup=_SETUP.value,
        directory=_DIRECTORY.value,
        spot=_SPOT.value,
        restarts=_RESTARTS.value,
        delete_when_done=_DELETE_WHEN_DONE.value,
    )
    return script, ".sh"


if __name__ == "__main__":
    cli.run(main, takes_arguments=True)
