"""evaluation/synthetic.py: the difficulties on which a checkpoint is evaluated, and the report. Accuracies are tested in
tests/training/test_task_training.py."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jaxlinear import evaluation
from jaxlinear.errors import UserError
from jaxlinear.evaluation import Options
from tests.training import tiny


@pytest.fixture(scope="module")
def run(tiny_run):
    return evaluation.open_run(tiny_run, 1)


@pytest.fixture(scope="module")
def task_run(run):
    """The run, as if it had been trained on a task."""
    config = run.config.copy_and_resolve_references()
    config.data.task, config.data.path = "mqar:pairs=2:vocab_size=64", ""
    return dataclasses.replace(run, config=config)


def test_report_and_table(run, tiny_dataset):
    specs = ["passkey:length=128:digits=2", "parity:length=32"]
    report = evaluation.evaluate_run(run, specs, Options(examples=20, batch_tokens=1024))
    json.dumps(report, allow_nan=False)
    rows = report[specs[0]]["difficulties"]
    assert [row["options"]["depth"] for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {(row["options"]["dataset"], row["options"]["split"]) for row in rows} == {(str(tiny_dataset), "heldout")}
    assert {(row["examples"], row["answers"], row["trained"]) for row in rows} == {(20, 20 * 3, False)}
    (parity,) = report[specs[1]]["difficulties"]
    assert (parity["chance"], parity["examples"], parity["answers"]) == (0.5, 20, 20 * 32)
    assert all(0 <= row["solved"] <= row["accuracy"] <= 1 for row in [*rows, parity])
    text = evaluation.table(report)
    for part in ("passkey:length=128:digits=2: Mohtashami", "depth  accuracy", "0.75", "parity:length=32: Grazzi"):
        assert part in text


def test_a_model_that_is_not_finite_is_refused(run):
    """The largest of logits that are NaN would be the first, which is right for half of the answers of parity."""
    broken = dataclasses.replace(run, parameters=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), run.parameters))
    with pytest.raises(UserError, match=r"on parity:length=8 is nan: the model's own values are not finite"):
        evaluation.evaluate_run(broken, ["parity:length=8"], Options(examples=8))


def test_the_difficulty_of_the_training(task_run):
    """The training's options apply where no others are given, and its difficulty is marked."""
    report = evaluation.evaluate_run(task_run, ["mqar:length=32+64"], Options(examples=8))
    rows = report["mqar:length=32+64"]["difficulties"]
    names = ("length", "pairs", "vocab_size")
    assert [tuple(row["options"][name] for name in names) for row in rows] == [(32, 2, 64), (64, 2, 64)]
    assert [row["trained"] for row in rows] == [True, False]
    assert "(as trained)" in evaluation.table(report).split("\n")[-2]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("perplexity", {}, r"was trained on mqar:pairs=2:vocab_size=64, not on text; evaluate it with --tasks=mqar"),
        ("perplexity:x=1", {}, r"perplexity takes no options after a colon; use --lengths, --batches and --data"),
        ("mqar:vocab_size=512", {}, r"mqar needs 512 tokens, but model.vocab_size is 384; set vocab_size"),
        ("mqar:pairs=4:pairs=8", {}, r"'mqar:pairs=4:pairs=8': pairs is given twice; leave one out"),
        ("mqar", {"examples": 0}, r"examples=0 must be at least 1"),
        ("speed", {}, r"there is no task 'speed'; the tasks are perplexity, mqar"),
        ("passkey", {}, r"passkey: it needs text: give data.path, --data or the option dataset"),
        ("passkey", {"data": "{data}"}, r"passkey: length=32 must be at least the 10\d tokens that are needed"),
        ("passkey:length=128", {"data": "{other}"}, "was not prepared with the tokenizer that"),
        ("passkey:length=128:dataset={other}", {}, "was not prepared with the tokenizer that"),
        ("perplexity", {"data": "{other}"}, "was not prepared with the tokenizer"),
    ],
)
def test_refusals(run, task_run, tiny_dataset, tmp_path, spec, options, message):
    of_text = "other" in f"{spec} {options}"
    tokenizer = json.loads((tiny_dataset / "manifest.json").read_text())["tokenizer"] | {"sha256": "0" * 64}
    paths = {"data": tiny_dataset, "other": tiny.copy_of(tiny_dataset, tmp_path / "data", tokenizer=tokenizer)}
    options = {name: value.format(**paths) if name == "data" else value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        evaluation.evaluate_run(run if of_text else task_run, [spec.format(**paths)], Options(**options))
