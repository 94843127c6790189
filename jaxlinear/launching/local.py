"""A run as several processes on this machine, connected by its loopback interface."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxlinear.errors import UserError
from jaxlinear.exit_status import PREEMPTED
from jaxlinear.launching.request import PROGRAM, Request

_PAUSE = 1.0  # seconds before a preempted run is restarted: one that ends at once would otherwise take a whole core


def run(request: Request, *, processes: int, requeue: bool = False) -> int:
    """Runs the request to its end and returns the combined status of its processes. SIGTERM is passed on to them, and
    SIGINT is passed on as SIGTERM: a terminal also sends its SIGINT to all of them, and a second one ends a run without
    saving.

    GPUs, those that ``CUDA_VISIBLE_DEVICES`` names if it is set, are divided equally among the processes. With ``requeue``,
    a run that was preempted is started again, unless this program was told to end.
    """
    if request.devices % processes:
        raise UserError(f"--processes={processes} does not divide {request.devices} devices")
    environments = [_environment(request, i, processes) for i in range(processes)]
    if shutil.which(request.python) is None:
        raise UserError(f"--python={request.python}: this machine has no such program; the default is {sys.executable}")
    if not pathlib.Path(PROGRAM).is_file():
        raise UserError(f"there is no {PROGRAM} in {pathlib.Path.cwd()}; run this in the folder of the project")
    told = False
    running: list[subprocess.Popen] = []

    def end(*_: Any) -> None:
        nonlocal told
        told = True
        for process in running:
            process.terminate()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            with held_port() as port:
                joining = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"] if processes > 1 else []
                for i, environment in enumerate(environments):
                    command = request.command(*joining, *([f"--process={i}"] if joining else []))
                    running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment))
                    if told:  # before this process existed to be told
                        running[-1].terminate()
                status = _joint_status([process.wait() for process in running])
            running.clear()
            if status == PREEMPTED and requeue and not told:
                time.sleep(_PAUSE)
            if status != PREEMPTED or told or not requeue:
                return status
            print("the run was preempted: restarting it", file=sys.stderr, flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _joint_status(statuses: Sequence[int]) -> int:
    """``PREEMPTED`` if some processes saved themselves and none failed, since the next start would fail again; else the
    largest of the failures, where failures by a signal are numbered as in a shell."""
    failures = [status if status >= 0 else 128 - status for status in statuses if status not in (0, PREEMPTED)]
    return max(failures or statuses)


def _environment(request: Request, process: int, processes: int) -> dict[str, str]:
    environment = dict(os.environ)
    if request.platform == "gpu" and processes > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = [str(i) for i in range(request.devices)] if visible is None else [x for x in visible.split(",") if x]
        if len(names) < request.devices:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible} names {len(names)} GPUs, but --target={request.target} asks for "
                f"{request.devices}; name as many, or ask for fewer"
            )
        each = request.devices // processes
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[process * each : (process + 1) * each])
    return environment


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port given to no other program in this context. Whoever asks for it, as JAX does for process 0, may share it."""
    kind, everywhere = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    with socket.socket(kind) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((everywhere, 0))
        yield held.getsockname()[1]
