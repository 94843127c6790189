"""Training a mixture of experts: its losses in the objective, its experts spread over devices, its optimisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlinear import config as configs
from jaxlinear.errors import UserError
from jaxlinear.models import load
from jaxlinear.training import optimizer as optimizers
from jaxlinear.training.job import Job
from jaxlinear.training.loop import FINISHED, train
from jaxlinear.training.metrics import read
from tests.training import tiny

EXPERTS = {
    "model__pattern": ("convolution",),
    "model__channel_mixer": "mixture_of_experts",
    "model__experts": 8,
    "model__experts_per_token": 2,
    "model__expert_width": 12,
    "training__load_balance_loss": 0.3,
    "training__router_z_loss": 0.2,
    "optimizer__clip_norm": 0.0,
    "optimizer__epsilon": 1e-3,
}
MESHES = [{"expert": 8}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}]
IN_PARTS = [{"data": 4, "sequence": 2}, {"data": 2, "expert": 2, "sequence": 2}]
STEPS = 5


@functools.cache
def trainer(**changes):
    return tiny.Trainer(tiny.config(**(EXPERTS | changes)))


def follow(trainer):
    state, lines = trainer.state(), []
    for step in range(STEPS):
        state, metrics = trainer(state, tiny.batch(seed=step, padding=3))
        lines.append([metrics[name] for name in ("loss", "load_balance", "router_z", "gradient_norm")])
    return state, lines


@functools.cache
def on_one_device(microbatches):
    state, lines = follow(trainer(training__microbatches=microbatches))
    return tiny.host(state), lines


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize(
    "sizes, microbatches", [*((sizes, 1) for sizes in MESHES), *((sizes, 2) for sizes in IN_PARTS)], ids=str
)
def test_8_devices_follow_one(sizes, microbatches):
    """In microbatches, each copy of the parameters has part of the losses, and its rows a different share of padding."""
    expected, lines = on_one_device(microbatches)
    assert np.all(np.ptp(lines, axis=0) > 1e-2)
    config = tiny.config(**EXPERTS, training__microbatches=microbatches)
    state, got = follow(tiny.Trainer(config, tiny.mesh(8, **sizes)))
    np.testing.assert_allclose(got, lines, rtol=1e-5)
    tiny.assert_close(state.parameters, expected.parameters, atol=1e-4)
    each_has_its_experts(state.parameters, sizes)
    each_has_its_experts(optax.tree.get(state.optimizer, "mu"), sizes)


def each_has_its_experts(parameters, sizes):
    kernels = parameters["stacks"][0]["blocks"][0]["mlp"]["gate_kernel"]  # [layers, E, D, F]
    parts = [sizes.get(axis, 1) for axis in ("expert", "fsdp", "tensor")]
    assert kernels.shape == (2, 8, 32, 12)
    for shard in kernels.addressable_shards:
        assert shard.data.shape == (2, 8 // parts[0], 32 // parts[1], 12 // parts[2])
    firsts = {(shard.index[1].start or 0) for shard in kernels.addressable_shards}
    assert firsts == set(range(0, 8, 8 // parts[0]))


def gradient_and_metrics(batch, **changes):
    """The gradient that a first step takes, computed from AdamW's first moment, and the metrics."""
    stepper = trainer(**changes)
    state, metrics = stepper(stepper.state(), batch)
    scale = 1 / (1 - stepper.config.optimizer.beta1)
    return jax.tree.map(lambda moment: scale * np.asarray(moment), optax.tree.get(state.optimizer, "mu")), metrics


@pytest.mark.slow(but=["4"])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_losses_enter_the_objective_with_their_weights(microbatches):
    """They are averaged over microbatches, whose shares of padding differ. The metric ``loss`` is the cross-entropy."""
    batch, architecture = tiny.batch(padding=11), trainer().architecture
    none = {"training__load_balance_loss": 0.0, "training__router_z_loss": 0.0}
    without, of_none = gradient_and_metrics(batch, **none)  # in one part: microbatches make no difference to it
    with_losses, metrics = gradient_and_metrics(batch, **({"training__microbatches": 4} if microbatches == 4 else {}))
    assert metrics["loss"] == pytest.approx(of_none["loss"], rel=1e-6)

    def layers(parameters, tokens, ids):
        _, _, losses = architecture.bind(parameters).hidden(tokens, ids)
        return 0.3 * losses["load_balance"] + 0.2 * losses["router_z"], losses

    parameters = tiny.parameters(architecture)
    direct = jax.grad(layers, has_aux=True)
    rows = [slice(part, None, microbatches) for part in range(microbatches)]
    each = [(batch["tokens"][part], batch["segment_ids"][part]) for part in rows]
    compiled = tiny.compiled(direct, parameters, *each[0])
    gradients, losses = zip(*(compiled(parameters, *part) for part in each), strict=True)
    mean = lambda trees: jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *trees)  # noqa: E731
    difference = jax.tree.map(np.subtract, with_losses, without)
    tiny.assert_close(difference, mean(gradients), atol=2e-6)
    assert np.max(np.abs(difference["stacks"][0]["blocks"][0]["mlp"]["router"])) > 1e-2
    for name, value in mean(losses).items():
        assert metrics[name] == pytest.approx(value, rel=1e-6)
        assert microbatches == 4 or of_none[name] == metrics[name]


def test_what_stands_in_the_padding_changes_nothing():
    batch = tiny.batch(padding=5)
    found = [gradient_and_metrics(x) for x in (batch, tiny.with_other_padding(batch))]
    (first, metrics), (second, others) = found
    for name in ("loss", "load_balance", "router_z"):
        assert others[name] == pytest.approx(metrics[name], rel=1e-6)
    tiny.assert_close(second, first, atol=1e-6)


def by_name(tree):
    return {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "mlp" in str(path)}


def test_experts_are_decayed_and_the_muon_takes_their_kernels():
    """Muon does not take the router, which gives logits; biases of experts are not decayed, though they have two axes."""
    architecture = tiny.described(configs.model_config(tiny.config(**EXPERTS)))
    kernels = {"gate_kernel", "up_kernel", "down_kernel"}
    decayed = by_name(optimizers.decay_mask(architecture))
    assert {name for name, value in decayed.items() if value} == kernels | {"router"}
    assert {"gate_bias", "up_bias", "down_bias"} < set(decayed)
    optimizer = optimizers.make_optimizer(tiny.config(**(EXPERTS | {"optimizer__name": "muon"})), architecture)
    parameters = jax.tree.map(jnp.asarray, tiny.parameters(architecture))
    gradients = jax.tree.map(lambda x: x + np.float32(0.01), parameters)
    first = tiny.compiled(lambda g, p: optimizer.update(g, optimizer.init(p), p), gradients, parameters)
    updates, _ = first(gradients, parameters)
    update = by_name(updates)["gate_kernel"] + 1e-2 * 0.1 * by_name(parameters)["gate_kernel"]  # without the decay
    values = np.linalg.svd(np.asarray(update), compute_uv=False)  # each expert's matrix by itself
    assert values.shape == (2, 8, 12) and values.max() < 2 * values.min()


@pytest.fixture
def experts_config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.model.update({"pattern": ("convolution",), "num_layers": 1, "channel_mixer": "mixture_of_experts"})
    configs.forget_unread(config, ["model.pattern"])
    config.model.update({"experts": 8, "experts_per_token": 2, "expert_width": 12})
    config.mesh.update({"data": 2, "expert": 4})
    return config


WITHOUT = {"model.channel_mixer": "gated_mlp"} | {
    f"model.{name}": 0 for name in ("experts", "experts_per_token", "expert_width")
}


@pytest.mark.parametrize(
    "changes, message",
    [
        (WITHOUT, r"^mesh.expert=4: the model has no experts \(model.channel_mixer is 'gated_mlp'\); set it to 1$"),
        ({"model.experts": 6}, r"^mesh.expert=4 does not divide model.experts=6$"),
        ({"training.batch_size": 12}, r"12 rows, .*\(data 2 x fsdp 1 x expert 4\).* works is (8|16)$"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(experts_config, changes, message):
    with pytest.raises(UserError, match=message):
        Job.build(tiny.changed(experts_config, changes))


def test_a_run(experts_config, tmp_path):
    """Losses of the layers are logged; the checkpoint of 8 devices is loaded on one."""
    assert train(experts_config, tmp_path) == FINISHED
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(1 <= line["load_balance"] < 8 and line["router_z"] > 0 for line in lines)
    kernels = load(tmp_path).stacks[0].blocks[0].mlp.up_kernel[...]
    assert kernels.shape == (1, 8, 32, 12) and kernels.sharding.num_devices == 1 and np.all(np.std(kernels, (2, 3)) > 0)
