"""What the benchmarks share: taking turns, a program in another environment, and the result as JSON."""

import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from jaxlinear.errors import RunError, UserError

flags.disclaim_key_flags()  # --json belongs to the program that asks for it


def define_json() -> None:
    """Defines ``--json``, which ``write`` reads."""
    flags.DEFINE_string("json", None, "Also write the result to this file.")


def write(result: Any) -> None:
    if path := flags.FLAGS["json"].value:
        pathlib.Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def alternate(parts: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[Any]]:
    """Calls all ``parts`` in turn, so that all see the same machine, for a warm-up round and then ``rounds`` more; returns
    each part's values in those."""
    values: dict[Any, list[Any]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, go in parts.items():
            values[name].append(go())
    return {name: of_part[1:] for name, of_part in values.items()}


class Worker:
    """A script of this directory in its own process, under the Python of its own environment, until the context ends. It
    runs one round for each line of its input."""

    def __init__(self, python: str, task: str, script: str = "recurrentgemma_worker.py", **options: Any):
        command = [python, str(pathlib.Path(__file__).with_name(script)), task]
        command += [f"--{name}={value}" for name, value in options.items()]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        except FileNotFoundError as error:
            raise UserError(f"--against={python} is not a Python") from error
        self.told = self._read()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def round(self) -> dict[str, Any]:
        """Runs one round and returns what it reports."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def tokens_per_second(self) -> float:
        """Of one round."""
        told = self.round()
        return told["tokens"] / told["seconds"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"the comparison side ended with status {self._process.wait()}; its reason is above")
        return json.loads(line)
