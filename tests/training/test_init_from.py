"""Runs that begin with the weights of another run."""

import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlinear import models
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.errors import UserError
from jaxlinear.training import state as states
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.init_from import Initial
from jaxlinear.training.job import Job
from jaxlinear.training.loop import FINISHED, _restore_or_create, train
from tests.training import tiny


@pytest.fixture
def config(tiny_config, tiny_run):
    return tiny.changed(tiny_config, {"training.initial_from": str(tiny_run), "training.seed": 7})


@pytest.mark.parametrize("step", [None, 1])
def test_weights_are_those_of_the_checkpoint_and_all_else_is_new(config, tiny_run, tmp_path, step):
    if step is not None:
        config.training.initial_from = str(tiny_run / "checkpoints" / str(step))
    job = Job.build(config)
    state, first, initial = _restore_or_create(job, Checkpoints(tmp_path, job.config))
    assert (first, str(initial)) == (0, f"{tiny_run}/checkpoints/{step or 2}")
    tiny.assert_equal(state.parameters, nnx.to_pure_dict(nnx.split(models.load(tiny_run, step, mesh=job.mesh))[1]))
    assert int(state.step) == 0
    assert all(not np.any(x) for x in jax.tree.leaves(tiny.host(state.optimizer)))


def test_the_new_parameters_are_gone_when_the_others_are_read(config, tmp_path, monkeypatch):
    """Otherwise a device would hold both at once."""
    job = Job.build(config)
    made, restore = [], Checkpoints.restore
    initialise = states.initialise

    def keep(*given):
        made.append(initialise(*given))
        return made[0]

    def read(*given):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(made[0].parameters))
        return restore(*given)

    monkeypatch.setattr(states, "initialise", keep)
    monkeypatch.setattr(Checkpoints, "restore", read)
    state, _, _ = _restore_or_create(job, Checkpoints(tmp_path, job.config))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states.to_trees(state)))


def test_it_goes_on_without_the_other_run(config, tiny_run, tmp_path):
    other, workdir = shutil.copytree(tiny_run, tmp_path / "other"), tmp_path / "run"
    config.training.update({"initial_from": str(other), "steps": 1})
    assert train(config, workdir) == FINISHED
    shutil.rmtree(other)
    config.training.steps = 2
    assert train(config, workdir) == FINISHED
    first, second = workdirs.read_starts(workdir)
    assert (first["step"], first["initial"]) == (0, f"{other}/checkpoints/2")
    assert second["step"] == 1 and "initial" not in second
    # It begins where the other ended, not where that began.
    losses, others = tiny.losses(workdir), tiny.losses(tiny_run)
    assert float(losses[1]) < float(others[1]) - 0.3
    config.training.initial_from = str(tiny_run)
    with pytest.raises(UserError, match=r"holds another run: training.initial_from is '.*other' there and '"):
        train(config, workdir)


def test_what_differs_and_fits_is_said(config, tiny_run, tmp_path, caplog):
    other = shutil.copytree(tiny_run, tmp_path / "other", ignore=shutil.ignore_patterns("tokenizer*"))
    config.training.initial_from = str(other)
    config.model.window = 4
    job = Job.build(config)
    with caplog.at_level(logging.WARNING):
        Initial.find(job)
        assert not caplog.records  # a run also looks before it writes anything
        _restore_or_create(job, Checkpoints(tmp_path, job.config))
    assert f"the weights of {other}, but model.window is 8 there and 4 in this config" in caplog.text
    assert f"the weights of {other}, which names no tokenizer: make sure that {config.data.path} was" in caplog.text


def test_the_text_of_a_task_has_its_tokenizer_compared_too(config, tmp_path):
    tokenizer = json.loads((pathlib.Path(config.data.path) / "manifest.json").read_text())["tokenizer"]
    other = tiny.copy_of(config.data.path, tmp_path / "other", tokenizer=tokenizer | {"sha256": "0" * 64})

    def find(dataset):
        changes = {"data.path": "", "data.task": f"passkey:digits=2:dataset={dataset}"}
        Initial.find(Job.build(tiny.changed(config, changes | {"training.sequence_length": 128})))

    find(config.data.path)
    with pytest.raises(UserError, match="was not prepared with the tokenizer that"):
        find(other)


def test_heldout_text_that_the_other_run_may_have_been_trained_on_is_said(config, tiny_run, tmp_path, caplog):
    apart = tiny.copy_of(config.data.path, tmp_path / "apart", seed=3)
    with caplog.at_level(logging.WARNING):
        _restore_or_create(Job.build(config), Checkpoints(tmp_path / "one", config))
        assert not caplog.records
        config.data.path = str(apart)
        _restore_or_create(Job.build(config), Checkpoints(tmp_path / "other", config))
    assert f"the weights of {tiny_run}, but {apart} was split with seed 3 and heldout_fraction 0.05" in caplog.text


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model.recurrent_width", 64, "the weights of another model: model.recurrent_width is 32 there and 64"),
        ("model.vocab_size", 512, "the weights of another model: model.vocab_size is 384 there and 512 in this"),
        (
            "model.norm_offset",
            0.0,
            "another form of RMSNorm: model.norm_offset is 1.0 there .*set model.norm_offset=1$",
        ),
        ("training.initial_from", "gone", "gone has no checkpoints: it is not the work directory of a run"),
        ("training.initial_from", "RUN/checkpoints/5", "has no checkpoint of step 5; it has 1, 2$"),
    ],
)
def test_what_does_not_fit_writes_nothing(config, tiny_run, tmp_path, key, value, message):
    value = value.replace("RUN", str(tiny_run)) if isinstance(value, str) else value
    with pytest.raises(UserError, match=message):
        train(tiny.changed(config, {key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
