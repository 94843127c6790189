"""Evaluates a trained run: python launch/evaluate.py --workdir=DIR [--tasks=...]. docs/evaluation.md explains the tasks."""

import json
import pathlib

from absl import flags, logging

from jaxlinear import cli
from jaxlinear.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
_TASKS = flags.DEFINE_list("tasks", ["perplexity"], "What to evaluate, as perplexity,mqar:vocab_size=512,passkey.")
_JSON = flags.DEFINE_string("json", None, "Also write everything to this file.")
_DATA = flags.DEFINE_string("data", None, "Another prepared dataset than the run's own.")
_LENGTHS = flags.DEFINE_list("lengths", None, "Multiples of the training length; 1,2,4,8 as far as the dataset goes.")
_EXAMPLES = flags.DEFINE_integer("examples", 256, "Examples of each difficulty of a synthetic task.")
_MESH = flags.DEFINE_list("mesh", [], "How all devices share a batch, as sequence=8; by default by rows, data=-1.")
_BATCHES = flags.DEFINE_integer("batches", 0, "Batches of each length; 0 takes the whole held-out split.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 0, "Tokens of a batch; 0 takes as many as in training.")


def main() -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what it is asked for: to open a run for reading only
    from jaxlinear import evaluation

    if _JSON.value and not pathlib.Path(_JSON.value).absolute().parent.is_dir():
        raise UserError(f"--json={_JSON.value}: its directory does not exist")
    report = evaluation.evaluate(
        _WORKDIR.value,
        step=_STEP.value,
        tasks=_TASKS.value,
        mesh=_MESH.value,
        data=_DATA.value,
        lengths=None if _LENGTHS.value is None else [_multiple(text) for text in _LENGTHS.value],
        batches=_BATCHES.value,
        batch_tokens=_BATCH_TOKENS.value,
        examples=_EXAMPLES.value,
    )
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(evaluation.table(report))


def _multiple(text: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"--lengths: {text!r} is not a whole number; write multiples of the training length, as 1,2,4")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
