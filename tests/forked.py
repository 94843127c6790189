"""Runs of the programs in ``launch/`` that share one start: what they import is imported once, then each runs in a fork, as
its own process with its own flags. The process that forks uses no device, since JAX's threads do not survive a fork.

As a program it reads lines of JSON, ``[program, argument, ...]``, and answers each with ``[status, stdout, stderr]``.
"""

import contextlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

REPOSITORY = pathlib.Path(__file__).parents[1]
_PATIENCE = 240  # seconds, after which a program ends by SIGALRM


@contextlib.contextmanager
def starter(**environment: str) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """``start(program, *arguments)`` runs a program to its end, in the root of the repository."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        text=True,
    )

    def start(*command: str) -> subprocess.CompletedProcess:
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        return subprocess.CompletedProcess(command, *json.loads(server.stdout.readline()))

    with server:
        yield start
        server.stdin.close()


def _fork(command: list[str]) -> tuple[int, str, str]:
    outputs = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in ("stdout", "stderr")]
    process = os.fork()
    if process == 0:
        for number, file in enumerate([open(os.devnull), *outputs]):
            os.dup2(file.fileno(), number)
        program = str(REPOSITORY / "launch" / f"{command[0]}.py")
        sys.argv, sys.path[0] = [program, *command[1:]], os.path.dirname(program)
        signal.alarm(_PATIENCE)
        runpy.run_path(program, run_name="__main__")
        sys.exit(0)
    _, status = os.waitpid(process, 0)
    texts = []
    for file in outputs:
        with file:
            file.seek(0)
            texts.append(file.read())
    return os.waitstatus_to_exitcode(status), *texts


if __name__ == "__main__":
    import jaxlinear.config  # noqa: F401 (JAX, Flax and the models, which take most of a start)

    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)  # in the fork, the program's end goes through here
