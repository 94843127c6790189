"""The mixture of experts against a loop over tokens and experts; its losses; its experts spread over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixture_of_experts import MixtureOfExperts
from jaxlinear.models.parameters import describe
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import sharding
from tests import numerics, oracles, small

IDS = np.array([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 0]], np.int32)
# name: changes of the config
CASES = {
    "biases": {},
    "no_biases": {"bias": False, "mlp_activation": "silu"},
    "one": {"experts_per_token": 1},
    "all": {"experts_per_token": 6},
    "lone": {"experts": 1, "experts_per_token": 1},
}


def config(**changes):
    values = {"channel_mixer": "mixture_of_experts", "experts": 6, "experts_per_token": 2, "expert_width": 10}
    return small.config(**(values | changes))


@functools.cache
def module(name="biases"):
    """``(config, graph, float64 parameters)``."""
    made = config(**CASES[name])
    return made, *small.module(lambda rngs: MixtureOfExperts(made, rngs=rngs))


def tokens(seed=0, rows=2, length=7):
    return numerics.normal(np.random.default_rng(seed), rows, length, 16)


@functools.cache
def forward(name="biases"):
    _, graph, _ = module(name)
    return numerics.jit(lambda parameters, x, ids: nnx.merge(graph, parameters)(x, segment_ids=ids))


def oracle(name, parameters, x, ids=None):
    made = module(name)[0]
    activation = {"gelu": oracles.gelu, "silu": oracles.silu}[made.mlp_activation]
    counted = None if ids is None else ids > 0
    return oracles.mixture_of_experts(parameters, x, made.experts_per_token, activation=activation, counted=counted)


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
@pytest.mark.parametrize("name, dtype", numerics.each_dtype(CASES, "biases"))
def test_values_are_those_of_the_oracle(name, ids, dtype):
    parameters, x = module(name)[2], tokens()
    with jax.enable_x64(dtype == "float64"):
        wide = numerics.cast(parameters, "float64" if dtype == "float64" else "float32")
        y, losses = forward(name)(wide, numerics.cast(x, dtype), ids)
    numerics.assert_close((y, losses), oracle(name, parameters, x, ids), numerics.TOLERANCES[dtype])
    assert y.dtype == dtype
    assert {loss.dtype for loss in losses.values()} == {jnp.dtype("float64" if dtype == "float64" else "float32")}


@functools.cache
def gradients(name):
    _, graph, _ = module(name)

    def value(parameters, x, weights):
        y, losses = nnx.merge(graph, parameters)(x, segment_ids=IDS)
        wide = losses["load_balance"].dtype
        return jnp.sum((weights * y).astype(wide)) + losses["load_balance"] + 0.5 * losses["router_z"]

    return numerics.jit(jax.grad(value, argnums=(0, 1)))


@pytest.mark.parametrize("name", ["biases", "one"])
def test_gradients_are_those_of_finite_differences(name):
    """Along each parameter and along x. The step is too small to change the choices."""
    parameters, x = module(name)[2], tokens()
    random = np.random.default_rng(1)
    weights = random.standard_normal(x.shape)
    found = numerics.run(gradients(name), parameters, x, weights, dtype="float64")

    def objective(x, *leaves):
        y, losses = oracle(name, dict(zip(parameters, leaves, strict=True)), x, IDS)
        return np.sum(weights * y) + losses["load_balance"] + 0.5 * losses["router_z"]

    inputs = (x, *parameters.values())
    for place, (key, gradient) in enumerate([("x", found[1]), *((key, found[0][key]) for key in parameters)]):
        directions = [np.zeros_like(value) for value in inputs]
        directions[place] = random.standard_normal(inputs[place].shape)
        expected = numerics.directional_derivative(objective, inputs, directions)
        assert abs(expected) > 1e-3, key
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * directions[place]), expected, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_in_fewer_bits(dtype):
    parameters, x = module()[2], tokens()
    weights = numerics.normal(np.random.default_rng(2), *x.shape)
    exact = numerics.run(gradients("biases"), parameters, x, weights, dtype="float64")
    wide = numerics.cast(parameters, "float32")
    found = gradients("biases")(wide, numerics.cast(x, dtype), numerics.cast(weights, dtype))
    numerics.assert_close(found, exact, {"float32": 1e-5, "bfloat16": 4e-2}[dtype])
    assert {leaf.dtype for leaf in jax.tree.leaves(found[0])} == {jnp.dtype("float32")}


def routed(router, x, ids=None):
    """y and the losses of the module with the given router, in float64."""
    return numerics.wide(numerics.run(forward(), module()[2] | {"router": router}, x, ids, dtype="float64"))


def test_losses_of_routers_made_by_hand():
    """Six tokens: token i likes only expert i and the next one, both equally."""
    x, router = np.zeros((1, 6, 16)), np.zeros((16, 6))
    for i in range(6):
        x[0, i, i] = 1.0
        router[i, [i, (i + 1) % 6]] = 30.0
    _, losses = routed(router, x, np.ones((1, 6), np.int32))
    np.testing.assert_allclose(losses["load_balance"], 1, rtol=1e-10)
    np.testing.assert_allclose(losses["router_z"], (30 + np.log(2)) ** 2, rtol=1e-10)
    # The first two alone: expert 1 has half of the choices and of the probability, 0 and 2 a quarter each.
    _, losses = routed(router, x, np.array([[1, 1, 0, 0, 0, 0]], np.int32))
    np.testing.assert_allclose(losses["load_balance"], 6 * (1 / 4 + 1 / 16 + 1 / 16), rtol=1e-10)
    # All tokens like one pair: a third of the experts has all of both.
    router[:] = np.array([30.0, 30.0, 0, 0, 0, 0])
    _, losses = routed(router, x, np.ones((1, 6), np.int32))
    np.testing.assert_allclose(losses["load_balance"], 3, rtol=1e-10)
    # Padding alone counts as no tokens.
    _, losses = routed(router, x, np.zeros((1, 6), np.int32))
    assert losses == {"load_balance": 0, "router_z": 0}


def test_no_token_is_dropped_when_all_choose_the_same():
    """300 tokens go to the same two of six experts."""
    x, router = tokens(rows=3, length=100), np.zeros((16, 6))
    x[..., 0] = 1.0
    router[0] = [0, 0, 9, 0, 8, 0]
    y, losses = routed(router, x)
    numerics.assert_close((y, losses), oracle("biases", module()[2] | {"router": router}, x), 1e-10)
    assert losses["load_balance"] > 2.9 and np.min(np.max(np.abs(y), axis=-1)) > 0.1


def test_the_order_of_the_experts_does_not_matter():
    parameters, x = module()[2], tokens()
    order = np.array([3, 0, 5, 1, 4, 2])
    turned = {name: value[:, order] if name == "router" else value[order] for name, value in parameters.items()}
    first, second = (numerics.run(forward(), p, x, None, dtype="float64") for p in (parameters, turned))
    numerics.assert_close(second, first, 1e-12)


def test_one_token_at_a_time():
    parameters, x = numerics.cast(module()[2], "float32"), numerics.cast(tokens(), "float32")
    whole, _ = forward()(parameters, x, None)
    parts = [forward()(parameters, x[:, t : t + 1], None)[0] for t in range(x.shape[1])]
    numerics.assert_close(jnp.concatenate(parts, axis=1), whole, 1e-6)


def test_a_model_of_experts_decodes_as_it_trains():
    """Layers in a scan and one outside it; losses are averaged over the layers."""
    made = config(num_layers=3, pattern=("convolution",) * 2)
    architecture = describe(made)
    values = numerics.cast(small.parameters(architecture.shapes), "float32")
    ids = np.random.default_rng(0).integers(0, 31, (2, 3)).astype(np.int32)
    whole, _, losses = numerics.jit(lambda p, ids: architecture.bind(p).hidden(ids))(values, ids)
    step = numerics.jit(lambda p, token, state: architecture.bind(p).hidden(token, None, state))
    state, parts = architecture.bind(values).init_state(2), []
    for t in range(3):
        part, state, _ = step(values, ids[:, t : t + 1], state)
        parts.append(part)
    numerics.assert_close(jnp.concatenate(parts, axis=1), whole, 1e-5)
    assert set(losses) == {"load_balance", "router_z"}
    assert 1 <= losses["load_balance"] < 6 and losses["router_z"] > 0


def test_the_losses_of_a_model_are_the_means_of_its_layers():
    """Routers of zeros give each layer, scanned or not, a balance of 1 and log normalisers of log 6."""
    architecture = describe(config(num_layers=3, pattern=("convolution",) * 2))
    values = numerics.cast(small.parameters(architecture.shapes), "float32")
    values = jax.tree.map_with_path(lambda path, x: 0 * x if path[-1].key == "router" else x, values)
    _, _, losses = numerics.jit(lambda p, ids: architecture.bind(p).hidden(ids))(values, np.zeros((1, 3), np.int32))
    np.testing.assert_allclose([losses["load_balance"], losses["router_z"]], [1, np.log(6) ** 2], rtol=1e-6)


def test_padding_does_not_count_in_the_losses_of_a_model():
    """Rows that end in padding give the losses of rows without it; here no token sees another."""
    architecture = describe(config(num_layers=3, pattern=("convolution",) * 2, convolution_width=1))
    values = numerics.cast(small.parameters(architecture.shapes), "float32")
    tokens, ids = np.arange(8, dtype=np.int32).reshape(2, 4), np.array([[1, 1, 2, 0], [1, 1, 1, 0]], np.int32)
    run = numerics.jit(lambda p, tokens, ids: architecture.bind(p).hidden(tokens, ids)[2])
    whole = run(values, tokens, np.ones_like(ids))
    found = run(values, tokens, ids)
    numerics.assert_close(found, numerics.wide(run(values, tokens[:, :3], ids[:, :3])), 1e-5)
    assert abs(found["router_z"] - whole["router_z"]) > 1e-3 * whole["router_z"]


def test_statistics_of_a_new_module():
    made = config(width=64, experts=8, expert_width=32, num_layers=4)
    parameters = nnx.to_pure_dict(nnx.state(MixtureOfExperts(made, rngs=nnx.Rngs(0))))
    deviations = {"router": 64, "gate_kernel": 64, "up_kernel": 64, "down_kernel": 32 * 4 / 2}
    for name, inverse in deviations.items():
        np.testing.assert_allclose(np.std(parameters[name]), inverse**-0.5, rtol=0.15, err_msg=name)
    assert not any(np.any(parameters[f"{name}_bias"]) for name in ("gate", "up", "down"))
    assert len({float(np.std(expert)) for expert in np.asarray(parameters["gate_kernel"])}) == 8


MESHES = {
    "fsdp2_tensor2_expert2": ({"fsdp": 2, "tensor": 2, "expert": 2}, {}),
    "fsdp2_tensor4_of_10_channels": ({"fsdp": 2, "tensor": 4}, {}),  # 4 does not divide 10: each device has all
    "expert4_of_6": ({"data": 2, "expert": 4}, {}),  # likewise for the experts
    "data2_sequence2_expert2": ({"data": 2, "sequence": 2, "expert": 2}, {"bias": False}),
    "rows_not_split": ({"fsdp": 4, "expert": 2}, {"rows": 3}),
}


@pytest.mark.parametrize("name", MESHES)
def test_experts_on_8_devices_give_the_numbers_of_one(name):
    sizes, changes = MESHES[name]
    rows = changes.get("rows", 8)
    made = config(**{key: value for key, value in changes.items() if key != "rows"})
    graph, parameters = small.module(lambda rngs: MixtureOfExperts(made, rngs=rngs))
    axes = {key: value.get_metadata("axes") for key, value in nnx.split(abstract(made))[1].items()}
    x, weights = tokens(rows=rows, length=4), tokens(seed=5, rows=rows, length=4)
    ids = np.arange(4 * rows, dtype=np.int32).reshape(rows, 4) % 5

    def value(parameters, x, weights, ids):
        y, losses = nnx.merge(graph, parameters)(x, segment_ids=ids)
        return jnp.sum(weights * y) + losses["load_balance"] + losses["router_z"], y

    def on_the_mesh(*inputs):
        with sharding.use_mesh(mesh):
            return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(*inputs)

    inputs = (*numerics.cast((parameters, x, weights), "float32"), ids)
    expected = numerics.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(*inputs)
    mesh = meshes.make_mesh(dict.fromkeys(meshes.AXES, 1) | sizes)
    places = {
        key: jax.sharding.NamedSharding(mesh, sharding.spec(axes[key], value.shape, mesh))
        for key, value in parameters.items()
    }
    of_rows = meshes.batch_sharding(mesh) if rows == 8 else None
    jitted = numerics.jit(on_the_mesh, in_shardings=(places, of_rows, of_rows, of_rows))
    numerics.assert_close(jitted(*inputs), expected, 1e-5)


def abstract(made):
    return nnx.eval_shape(lambda: MixtureOfExperts(made, rngs=nnx.Rngs(0)))
