"""Joining the processes of one run, and what they must agree on."""

import glob
import importlib.util
import os
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlinear.errors import UserError


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to the others of its run, before any device is touched; alone, it does nothing.

    With ``coordinator`` (HOST:PORT of process 0), the number of ``processes`` and the number of this one, these are
    taken. Without, SLURM (more than one task in the step), GKE and TPU pods are known by their environment, and JAX finds
    the rest out by itself.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        assert processes is not None and process is not None
        if not 0 <= process < processes:
            raise UserError(f"--process={process} is not one of --processes={processes}: they count from 0")
        jax.distributed.initialize(coordinator, processes, process)
    elif len(missing) < len(given):
        raise UserError(f"--coordinator, --processes and --process belong together; --{missing[0]} is missing")
    elif _under_a_scheduler():
        jax.distributed.initialize()


def _under_a_scheduler() -> bool:
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))) > 1
    slurm = slurm and "SLURM_PROCID" in os.environ
    gke = "JOBSET_NAME" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and _has("libtpu")
    return slurm or gke or tpu


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_first() -> bool:
    """Whether this process writes what only one may write: configs, metrics, the progress bar."""
    return jax.process_index() == 0


def check_agreement(what: str, text: str) -> None:
    """Raises ``UserError`` on every process unless all were given the same text."""
    if jax.process_count() == 1:
        return
    # In two halves, since an array of integers is 32 bits wide.
    own = np.array([zlib.crc32(text.encode()) >> 16, zlib.crc32(text.encode()) & 0xFFFF, len(text)], np.int32)
    of_all = multihost_utils.process_allgather(own)
    others = [int(i) for i in np.flatnonzero((of_all != of_all[0]).any(axis=1))]
    if others:
        named = ", ".join(map(str, others))
        raise UserError(f"{what} of process {named} differs from that of process 0; all must be given the same")
