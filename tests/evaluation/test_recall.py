"""evaluation/recall.py and launch/recall.py: layers trained in the same way, and the table of what they recall."""

import re

import pytest

from jaxlinear import config as configs
from jaxlinear import evaluation
from jaxlinear.data import tasks
from jaxlinear.errors import UserError
from jaxlinear.evaluation import recall
from jaxlinear.training import metrics
from jaxlinear.training.job import task_setting


def config(task="mqar", **model):
    made = configs.default()
    made.data.task = task
    made.model.update(model)
    return made


@pytest.mark.parametrize(
    "name, pattern",
    [("kda", ("kda",)), ("griffin", ("rg_lru", "rg_lru", "sliding_window")), ("gla+attention", ("gla", "attention"))],
)
def test_patterns(name, pattern):
    given = config(num_layers=3, recurrent_heads=2)
    made = recall.with_pattern(given, name, {})
    assert (made.model.pattern, made.model.num_layers) == (pattern, 3)
    assert made.model.recurrent_heads == (None if name == "griffin" else 2), "which griffin does not read"
    assert given.model.pattern == config().model.pattern


def test_keys_of_one_pattern():
    name, changes = recall.split("kda:optimizer.learning_rate=0.25:training.steps=7:data.task=mqar")
    made = recall.with_pattern(configs.default(), name, changes)
    assert (name, made.optimizer.learning_rate, made.training.steps, made.data.task) == ("kda", 0.25, 7, "mqar")
    assert recall.with_pattern(made, "griffin", {"model.recurrent_heads": "0"}).model.recurrent_heads == 0


def check(*specs):
    recall.check(config("mqar:vocab_size=64", num_layers=2, num_heads=2, width=16), specs)


def with_pattern(task="mqar", **changes):
    recall.with_pattern(config(task), "kda", {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize(
    "refused, message",
    [
        # All are checked before the first is trained. Two of one name would be one run, and the second row would show
        # weights that the first had trained.
        (lambda: check("gla:training.steps=200", "gla:training.steps=300"), "gla is named 2 times; run each sep"),
        (lambda: check("gla", "kdaa"), "there is no mixer 'kdaa'"),
        (lambda: check("gla", "hawk:training.steps=0"), "training.steps"),
        (lambda: with_pattern(""), "data.task is not set: .*; configs/mqar.py sets it"),
        (lambda: recall.split("kda:training.step=7"), r"no config key 'training.step'; .* 'training.steps'\?"),
        (lambda: recall.split("kda:steps"), "'kda:steps': 'steps' is not an option; write NAME:option=VALUE"),
        (lambda: with_pattern(training__steps="many"), "kda: .*many is not of type int"),
        (lambda: with_pattern(logging__tensorboard="false"), "kda: logging.tensorboard is a bool; only keys that are"),
    ],
)
def test_refusals(refused, message):
    check("gla:training.steps=200", "gla+attention")
    with pytest.raises(UserError, match=message):
        refused()


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        ("mqar:pairs=1+2:vocab_size=64", "mqar:length=256:pairs=2"),
        ("parity", "parity:length=256"),
        ("passkey:digits=3", "passkey:length=256:depth=-1.0"),
        ("passkey:depth=0.5+1", "passkey:length=256:depth=1.0"),
    ],
)
def test_one_difficulty_is_asked(tiny_config, task, asked):
    """It is the last one trained, without a reference; a task on text uses held-out text."""
    config = tiny_config.copy_and_resolve_references()
    config.data.task, config.training.sequence_length, config.model.vocab_size = task, 256, 384
    (*_, trained) = tasks.training_set(task, task_setting(config, "train"))
    assert recall.asked(config) == asked
    (found,) = tasks.difficulties(asked, task_setting(config, "heldout"), [trained])
    assert found.options() == trained.options() | ({"split": "heldout"} if trained.READS_TEXT else {})


def test_table():
    rows = [recall.Row("kda", 1234, 20, 0.98765, 0.5, 12.3, 20.1), recall.Row("gla", 1, 2000, 1.0, 1.0, 1.0, 2.0)]
    lines = recall.table("mqar:pairs=8", rows).split("\n")
    assert lines[0] == "mqar:pairs=8" and len(lines) == 4
    assert re.split(r" +", lines[2]) == ["kda", "1,234", "20", "98.77%", "50.00%", "12", "20"]


def test_program(start, tmp_path):
    """A run of two steps, then its table without training."""
    keys = "data.task=mqar:pairs=2:vocab_size=32 model.width=16 model.num_layers=1 training.sequence_length=16 "
    keys += "training.batch_size=8 training.steps=2 schedule.warmup_steps=0 evaluation.every_steps=0 "
    keys = [f"--config.{key}" for key in (keys + "logging.tensorboard=false").split()]
    asked = "mqar:length=16"
    for _ in range(2):
        done = start("recall", f"--workdir={tmp_path}", "--patterns=convolution", "--examples=16", *keys)
        assert done.returncode == 0, done.stderr
        task, _, row = done.stdout.strip().split("\n")
        assert task == "mqar:pairs=2:vocab_size=32" and row.split()[0] == "convolution"
        (found,) = evaluation.evaluate(tmp_path / "convolution", tasks=[asked], examples=16)[asked]["difficulties"]
        assert row.split()[3:5] == [f"{found['accuracy']:.2%}", f"{found['solved']:.2%}"]
    assert metrics.read(tmp_path / "convolution")[-1]["step"] == 2
