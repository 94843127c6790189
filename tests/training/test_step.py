"""The training step on one device: what it optimises and what it skips; microbatches change nothing."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxlinear.parallel import feeding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import state as states
from jaxlinear.training.step import make_loss_step, make_objective
from tests import numerics
from tests.training import tiny

# A large epsilon makes AdamW's update nearly proportional to the gradient, so that small gradients are compared too. The
# logits are capped so low that, without the cap, every loss would be different.
PLAIN = {"optimizer__epsilon": 1.0, "optimizer__clip_norm": 0.0, "model__logit_soft_cap": 2.0}


@functools.cache
def trainer(**changes):
    return tiny.Trainer(tiny.config(**PLAIN, **changes))


def watchful():
    """A step that skips spikes and writes norms by group."""
    return trainer(training__spike_multiple=3.0, logging__layer_norms=True)


def slow_start():
    return trainer(schedule__warmup_steps=6, optimizer__learning_rate=0.5)


def test_loss_is_that_of_the_logits_and_padding_does_not_count():
    """The training and evaluation steps, against NumPy on the logits of the whole batch."""
    train, batch = trainer(), tiny.batch(padding=5)
    architecture, state = train.architecture, train.state()
    parameters = tiny.host(state.parameters)

    def forward(parameters, batch):
        return architecture.bind(parameters)(batch["tokens"], batch["segment_ids"])[0]

    logits = np.asarray(tiny.compiled(forward, parameters, batch)(parameters, batch), np.float64)
    log_normaliser = np.log(np.sum(np.exp(logits), axis=-1))
    nll = log_normaliser - np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    counted = batch["segment_ids"] > 0
    assert 0 < np.sum(~counted) == 20

    _, metrics = train(state, batch)
    np.testing.assert_allclose(metrics["loss"], nll[counted].mean(), rtol=1e-5)
    assert abs(metrics["loss"] - nll.mean()) > 1e-4

    for only in (np.arange(nll.size).reshape(nll.shape) == np.flatnonzero(counted)[7], np.zeros_like(counted)):
        targets = np.where(only, batch["targets"], -1).astype(np.int32)  # one token is to be predicted, or none
        _, metrics = train(train.state(), dict(batch, targets=targets))
        np.testing.assert_allclose(metrics["loss"], nll[only].sum(), rtol=1e-5)
        assert (metrics["gradient_norm"] > 0) == only.any() and metrics["skips"] == 0

    step = make_loss_step(train.config, architecture, train.mesh)
    placed = train.place(batch)
    got, targets = tiny.compiled(step, parameters, placed)(parameters, placed)
    np.testing.assert_array_equal(targets, counted)
    np.testing.assert_allclose(got, np.where(counted, nll, 0), rtol=1e-4, atol=1e-5)


def test_documents_that_are_not_segmented_see_each_other():
    """As if each row were one document, in training and in evaluation; padding still does not count."""
    batch, architecture = tiny.batch(padding=5), tiny.architecture(("rg_lru",), 1)
    one = dict(batch, segment_ids=np.minimum(batch["segment_ids"], 1))
    parameters = tiny.parameters(architecture)
    weights = (batch["segment_ids"] > 0) / np.float32(np.sum(batch["segment_ids"] > 0))

    def losses(segmented, batch):
        config = tiny.config(data__segment_documents=segmented)
        placed = feeding.place(batch, meshes.batch_sharding(tiny.mesh()), tiny.BATCH)
        for function, arguments in (
            (make_loss_step(config, architecture, tiny.mesh()), (parameters, placed)),
            (make_objective(config, architecture), (parameters, batch, weights)),
        ):
            yield np.asarray(tiny.compiled(function, *arguments)(*arguments)[0])

    for found, expected, apart in zip(losses(False, batch), losses(True, one), losses(True, batch), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert np.max(np.abs(found - apart)) > 1e-3


def test_what_stands_in_the_padding_changes_nothing():
    train, batch = trainer(), tiny.batch(padding=5)
    (first, metrics), (second, other) = (train(train.state(), x) for x in (batch, tiny.with_other_padding(batch)))
    assert metrics["loss"] == other["loss"]
    tiny.assert_close(second.parameters, first.parameters, atol=1e-7)


def test_microbatches_give_the_same_update():
    """Even if the parts have unequal shares of padding."""
    batch = tiny.batch(padding=11)
    whole, in_parts = trainer(), trainer(training__microbatches=4)
    (first, metrics), (second, other) = (train(train.state(), batch) for train in (whole, in_parts))
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(other["gradient_norm"], metrics["gradient_norm"], rtol=1e-6)
    tiny.assert_close(second.parameters, first.parameters, atol=1e-6)
    moved = jax.tree.map(lambda x, old: np.max(np.abs(x - old)), first.parameters, tiny.parameters(whole.architecture))
    assert min(jax.tree.leaves(moved)) > 2e-6  # so that a missing part would show
    tiny.assert_close(second.optimizer, first.optimizer, rtol=1e-4, atol=1e-6)


def test_z_loss_is_in_the_objective_and_not_in_the_loss():
    plain, with_z = trainer(), trainer(training__z_loss=0.1)
    (first, metrics), (second, other) = (train(train.state(), tiny.batch()) for train in (plain, with_z))
    assert metrics["loss"] == other["loss"]
    assert abs(other["gradient_norm"] / metrics["gradient_norm"] - 1) > 0.01
    assert np.any(np.asarray(first.parameters["embedding"]) != np.asarray(second.parameters["embedding"]))


def test_the_weight_of_the_z_loss_does_not_depend_on_the_microbatches():
    """The tokens' weights sum to 1 over the whole batch."""
    batch, architecture = tiny.batch(), tiny.architecture(("rg_lru",), 1)
    weights = np.full(batch["tokens"].shape, 1 / batch["tokens"].size, np.float32)
    arguments = tiny.parameters(architecture), batch, weights
    found = []
    for microbatches in (1, 4):
        objective = make_objective(tiny.config(training__z_loss=0.1, training__microbatches=microbatches), architecture)
        total, losses = tiny.compiled(objective, *arguments)(*arguments)
        found.append((float(total), float(losses["loss"])))
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0][0] > found[0][1] + 0.1


def test_a_run_begins_with_the_parameters_of_its_seed():
    """All bits of the seed matter, although JAX's keys take 32."""
    architecture = tiny.architecture(("rg_lru",), 1)

    def create(seed):
        return tiny.host(numerics.jit(lambda: states.create(architecture, optax.identity(), seed).parameters)())

    first, others = create(3), [create(seed) for seed in (4, 3 + 2**32, 3 + 2**33)]
    tiny.assert_equal(create(3), first)
    for i, other in enumerate(others):
        for seen in [first, *others[:i]]:
            assert np.mean(seen["embedding"] == other["embedding"]) < 0.01


def test_a_gradient_that_is_not_finite_is_skipped():
    train = watchful()
    broken = tiny.parameters(train.architecture)
    broken["norm"]["scale"][3] = np.inf
    state = train.state(parameters=broken, skips=np.int32(2), skips_in_a_row=np.int32(1), step=np.int32(9))
    before = tiny.host(state)
    after, metrics = train(state, tiny.batch())
    assert not np.isfinite(metrics["gradient_norm"])
    assert (metrics["skips"], metrics["skips_in_a_row"]) == (3, 2)
    assert (int(after.step), int(after.skips), int(after.skips_in_a_row)) == (10, 3, 2)
    for name in ("parameters", "optimizer", "norm_average", "key"):
        tiny.assert_equal(getattr(after, name), getattr(before, name))


@pytest.mark.parametrize(
    "step, skips, average, skipped",
    [
        (25, 0, 1 / 4, True),  # four times the average: more than three
        (25, 0, 1 / 2, False),
        (19, 0, 1 / 4, False),  # too early to tell
        (20, 0, 1 / 4, True),
        (25, 6, 1 / 4, False),  # of 25 steps only 19 were applied
        (26, 6, 1 / 4, True),
        (26, 6, 0.36, False),  # the average, too, is of 20 steps
    ],
)
def test_a_spike_is_skipped(step, skips, average, skipped):
    train = watchful()
    norm = train(train.state(), tiny.batch())[1]["gradient_norm"]
    running = average * norm * (1 - 0.98 ** (step - skips))
    state = train.state(
        step=np.int32(step), skips=np.int32(skips), skips_in_a_row=np.int32(3), norm_average=np.float32(running)
    )
    before = tiny.host(state)
    after, metrics = train(state, tiny.batch())
    assert metrics["skips"] == skips + skipped and metrics["skips_in_a_row"] == (4 if skipped else 0)
    assert int(after.step) == step + 1
    if skipped:
        tiny.assert_equal((after.parameters, after.optimizer), (before.parameters, before.optimizer))
        assert float(after.norm_average) == np.float32(running)
    else:
        assert np.any(np.asarray(after.parameters["embedding"]) != before.parameters["embedding"])
        np.testing.assert_allclose(after.norm_average, 0.98 * running + 0.02 * norm, rtol=1e-5)


def test_the_loss_of_one_batch_falls():
    train = slow_start()
    state, losses = train.state(), []
    for step in range(12):
        state, metrics = train(state, tiny.batch())
        losses.append(metrics["loss"])
        assert int(state.step) == step + 1
    assert losses[-1] < losses[0] - 1.0 and np.all(np.diff(losses[:8]) < 0), losses
    # Skipped steps do not advance the schedule.
    metrics = train(train.state(step=np.int32(7), skips=np.int32(3)), tiny.batch())[1]
    np.testing.assert_allclose(metrics["learning_rate"], 0.5 * 5 / 6, rtol=1e-6)


def test_norms_by_group():
    train = watchful()
    before = tiny.parameters(train.architecture)["embedding"]
    after, metrics = train(train.state(), tiny.batch())
    for name in ("gradient_norm", "parameter_norm"):
        parts = {key.split("/")[1]: value for key, value in metrics.items() if key.startswith(f"{name}/")}
        assert set(parts) == {"embedding", "stack_0_0", "stack_0_1", "norm"} and min(parts.values()) > 0
        np.testing.assert_allclose(metrics[name], np.linalg.norm([*parts.values()]), rtol=1e-5)
    norm = metrics["parameter_norm/embedding"]
    np.testing.assert_allclose(norm, np.linalg.norm(after.parameters["embedding"]), rtol=1e-5)
    assert norm != pytest.approx(np.linalg.norm(before), rel=1e-7)
    assert set(trainer().step.out_info[1]) == {key for key in metrics if "/" not in key}


def test_the_step_moves_nothing_between_host_and_device():
    train = trainer()
    state, batch = train.state(), train.place(tiny.batch())
    with jax.transfer_guard("disallow"):
        state, metrics = train.step(state, batch)
        train.step(state, batch)
        with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device"):
            jax.numpy.add(batch["tokens"], 1)
    assert np.isfinite(float(metrics["loss"]))
