"""A run on the TPU VMs of a slice: a shell script that asks for the slice, starts one process per host, and begins again
when the slice is taken away.

The shell is in files of its own: ``tpu_vm.sh`` runs where ``gcloud`` is, ``tpu_vm_host.sh`` on each host. ``render`` writes
before each what it reads.
"""

import hashlib
import re
import shlex
from importlib import resources

from jaxlinear.errors import UserError
from jaxlinear.exit_status import BAD_INPUT, PREEMPTED
from jaxlinear.launching.request import Request

# gcloud's names for them, and the software of their hosts (cloud.google.com/tpu/docs/runtimes).
_TYPES = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}


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
    # Two runs whose work directories have the same name are two jobs: a slice of one job's name could be the other's.
    name = f"{request.name}-{hashlib.sha256(request.workdir.rstrip('/').encode()).hexdigest()[:6]}"
    # By shape: --accelerator-type gives only the number of chips, and gcloud then chooses any shape that it likes.
    asked = f"--node-id={name} --type={_TYPES[request.kind]} --topology={request.shape}"
    asked += f" --runtime-version={_RUNTIMES[request.kind]}" + (" --spot" if spot else "")
    before = f"flock -n ~/{name}.lock true || exit 0\n{setup}\n"
    run = f"""run=~/{name}
directory={shlex.quote(directory)}
preempted={PREEMPTED}
training() {{ {request.line()}; }}

{_shell("tpu_vm_host.sh")}"""
    return f"""#!/bin/bash
# Asks for a {request.kind} slice of {request.shape}, trains on it, and asks again when it is taken away. The same
# command goes on from what was saved: the work directory must be on a file system that outlives the slice, and is the same
# on all hosts. A run goes on without this script; started again, the script follows it.

name={name} # the end is the work directory's mark
where=(--zone={shlex.quote(zone)} --project={shlex.quote(project)})
asked=({asked})
restarts={restarts}
delete_when_done={str(delete_when_done).lower()}
preempted={PREEMPTED} bad_input={BAD_INPUT} # statuses of the run

# On each host, before the run; not beside one to which the connection was lost.
{_prints("setup", before)}
# On each host: the run.
{_prints("train", run)}
{_shell("tpu_vm.sh")}"""


def _shell(file: str) -> str:
    return (resources.files(__package__) / file).read_text(encoding="utf-8")


def _prints(name: str, text: str) -> str:
    """A function of the shell that prints the text, which ends with a line break."""
    end = "END"
    while end in text.splitlines():  # as when it has a here-document of its own
        end += "_"
    return f"{name}() {{\n  cat <<'{end}'\n{text}{end}\n}}\n"
