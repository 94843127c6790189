"""Evaluates a trained run: python launch/evaluate.py --workdir=DIR [--tasks=...]. docs/evaluation.md explains the tasks."""

import json
import pathlib

from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
_TASKS = flags.DEFINE_list("tasks", ["perplexity"], "What to evaluate, e.g. perplexity,mqar:vocab_size=512,passkey.")
_JSON = flags.DEFINE_string("json", None, "Also write all results to this file.")
_DATA = flags.DEFINE_string("data", None, "A prepared dataset to use instead of the run's own.")
_LENGTHS = flags.DEFINE_list("lengths", None, "Multiples of the training length; by default those of 1,2,4,8 that fit.")
_EXAMPLES = flags.DEFINE_integer("examples", 256, "Examples of each difficulty of a synthetic task.")
_MESH = flags.DEFINE_list("mesh", [], "How all devices share a batch, e.g. sequence=8; by default by rows, data=-1.")
_BATCHES = flags.DEFINE_integer(
    "batches", 0, "Batches of the longest rows, and as much text in shorter ones; 0 takes the whole split."
)
_FOLLOW = flags.DEFINE_boolean(
    "follow", False, "Evaluate every checkpoint as it appears, until the run ends; results go to WORKDIR/evaluations."
)
_POLL = flags.DEFINE_float("poll", 10.0, "With --follow: seconds between looks for checkpoints.", lower_bound=0.0)
_PATIENCE = flags.DEFINE_float(
    "patience", 0.0, "With --follow: end after this many seconds without a new checkpoint; 0 means never."
)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 0, "Tokens per batch; 0 takes those of a training microbatch.")


def main() -> None:
    cli.leave_out_warnings_of_orbax()
    from jaxlinear import evaluation

    cli.check_output("json", _JSON.value)
    _check_read(_TASKS.value)
    options = evaluation.Options(
        data=_DATA.value,
        lengths=None if _LENGTHS.value is None else tuple(_multiple(text) for text in _LENGTHS.value),
        batches=_BATCHES.value,
        batch_tokens=_BATCH_TOKENS.value,
        examples=_EXAMPLES.value,
    )
    if not _FOLLOW.value:
        for flag in (_POLL, _PATIENCE):
            if flag.present:
                raise UserError(f"--{flag.name} is for --follow, which waits for checkpoints; leave it out")
        report = evaluation.evaluate(
            _WORKDIR.value, step=_STEP.value, tasks=_TASKS.value, mesh=_MESH.value, options=options
        )
        _write(report)
        print(evaluation.table(report))
        return
    if _STEP.value is not None:
        raise UserError(f"--follow evaluates every checkpoint; leave --step={_STEP.value} out")
    from jaxlinear.evaluation import following

    reports = []
    for report in following.follow(
        _WORKDIR.value, _TASKS.value, options, mesh=_MESH.value, poll=_POLL.value, patience=_PATIENCE.value
    ):
        reports.append(report)
        _write(reports)
        print(evaluation.table(report), end="\n\n", flush=True)
    print(f"{len(reports)} checkpoints; {following.directory(_WORKDIR.value) / following.PAGE} has the curves")


def _check_read(specs: list[str]) -> None:
    """Raises ``UserError`` for a flag that none of the tasks reads."""
    from jaxlinear import evaluation
    from jaxlinear.data import tasks

    evaluation.check_names(specs)
    asked = {spec.split(":")[0] for spec in specs}
    for flag, readers in (
        (_LENGTHS, {"perplexity"}),
        (_BATCHES, {"perplexity"}),
        (_DATA, {"perplexity", *(name for name, task in tasks.TASKS.items() if task.READS_TEXT)}),
        (_EXAMPLES, set(tasks.TASKS)),
    ):
        if flag.present and not asked & readers:
            named = ", ".join(sorted(readers))
            raise UserError(f"--{flag.name} is for {named}, and --tasks={','.join(specs)} has none; leave it out")


def _write(reports: dict | list) -> None:
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


def _multiple(text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(
            f"--lengths: {text!r} is not a whole number; write multiples of the training length, such as 1,2,4"
        )
    return int(text)


if __name__ == "__main__":
    cli.run(main)
