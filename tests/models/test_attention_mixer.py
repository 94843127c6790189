"""What attention and sliding_window share, and attention's context: end of the state, heads over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear.models.mixers.attention import Attention
from jaxlinear.models.mixers.sliding_window import SlidingWindow
from jaxlinear.models.parameters import describe
from jaxlinear.ops import backends
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import sharding
from tests import numerics, small
from tests.mixer_oracles import ORACLES

CONTEXT = 8
BOTH = pytest.mark.parametrize("mixer", [Attention, SlidingWindow])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("positions", [(6, 6, 6), (6, 3, 11)])
def test_a_token_on_a_tpu_is_the_same(groups, positions):
    """Rows at one slot and at several; one key head for all heads, and one for each."""
    config = small.config(num_heads=4, key_value_heads=groups, window=5)
    graph, parameters = small.module(lambda rngs: SlidingWindow(config, rngs=rngs))
    layer = nnx.merge(graph, numerics.cast(parameters, "float32"))
    random = np.random.default_rng(0)
    past = {name: random.standard_normal((3, groups, 5, 4)).astype(np.float32) for name in ("keys", "values")}
    state = past | {name: np.array(positions, np.int32) for name in ("position", "seen")}
    x = random.standard_normal((3, 1, 16)).astype(np.float32)
    expected, expected_state = numerics.jit(lambda x, state: layer(x, state=state))(x, state)
    with backends.use_platform("tpu"):
        y, new = numerics.jit(lambda x, state: layer(x, state=state))(x, state)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    for name, value in expected_state.items():
        np.testing.assert_array_equal(new[name], value)


def attention():
    """``(run(x, ids, state), init_state)`` with room for 8 tokens."""
    config = small.config(num_heads=4, key_value_heads=2, context=CONTEXT)
    graph, parameters = small.module(lambda rngs: Attention(config, rngs=rngs))
    layer = nnx.merge(graph, numerics.cast(parameters, "float32"))
    return numerics.jit(lambda x, ids=None, state=None: layer(x, segment_ids=ids, state=state)), layer.init_state


def tokens(length, rows=1):
    return jnp.asarray(np.random.default_rng(0).standard_normal((rows, length, 16)), jnp.float32)


def lost(y):
    """``[B, T]``: which tokens are NaN. A token is NaN in all channels or in none."""
    nan = np.isnan(y)
    assert (nan.all(axis=-1) == nan.any(axis=-1)).all()
    return nan.any(axis=-1)


def test_a_document_beyond_the_context_is_never_wrong_in_silence():
    """One pass may be longer than the context; a document that continues from a state may not."""
    run, init_state = attention()
    x = tokens(12)
    whole, after = run(x)
    assert not lost(whole).any()
    numerics.assert_close(run(x, None, init_state(1))[0], whole, 1e-6)  # an empty past equals none

    parts, state = [], init_state(1)
    for t in range(12):
        y, state = run(x[:, t : t + 1], None, state)
        parts.append(y)
    assert lost(jnp.concatenate(parts, axis=1)).tolist() == [[False] * CONTEXT + [True] * 4]
    numerics.assert_close(jnp.concatenate(parts[:CONTEXT], axis=1), whole[:, :CONTEXT], 1e-5)

    _, state = run(x[:, :5])
    y, state = run(x[:, 5:], None, state)
    assert lost(y).tolist() == [[False] * 3 + [True] * 4]
    numerics.assert_close(y[:, :3], whole[:, 5:CONTEXT], 1e-5)
    assert lost(run(x[:, :1], None, after)[0]).all() and lost(run(x[:, :2], None, state)[0]).all()


def test_only_the_document_that_goes_on_is_lost():
    """The documents after it have all of their past in the same run."""
    run, _ = attention()
    x, more = tokens(6), tokens(14)
    _, state = run(x)
    ids = np.array([[1] * 4 + [2] * 10], np.int32)
    y, state = run(more, ids, state)
    assert lost(y).tolist() == [[False] * 2 + [True] * 2 + [False] * 10]
    numerics.assert_close(y[:, 4:], run(more[:, 4:])[0], 1e-5)
    assert lost(run(x[:, :1], None, state)[0]).all()  # the second document has 10 tokens by now

    _, state = run(more, np.array([[1] * 9 + [2] * 5], np.int32))
    assert lost(run(x, None, state)[0]).tolist() == [[False] * 3 + [True] * 3]


def test_training_pays_for_no_cache():
    """The compiled program leaves out the state that a training pass returns but does not use."""

    def memory(context):
        architecture = describe(small.config(pattern=("attention",), num_layers=2, context=context))
        tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        loss = lambda parameters, tokens: jnp.sum(architecture.bind(parameters).hidden(tokens)[0] ** 2)  # noqa: E731
        compiled = numerics.jit(jax.grad(loss)).lower(architecture.shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(2**20) == memory(16)


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@BOTH
def test_heads_over_devices(mixer, groups):
    """4 devices hold 8 query heads; there are as many key heads as devices, fewer or more."""
    config = small.config(width=32, num_heads=8, key_value_heads=groups, window=5)
    graph, parameters = small.module(lambda rngs: mixer(config, rngs=rngs))
    mesh = meshes.make_mesh(dict.fromkeys(meshes.AXES, 1) | {"tensor": 4, "data": 2})
    x = np.random.default_rng(0).standard_normal((4, 11, 32))
    ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (4, 11))))

    def run(parameters, x):
        return nnx.merge(graph, parameters)(x, segment_ids=ids)[0]

    def run_on_mesh(parameters, x):
        parameters = jax.tree.map_with_path(place, parameters)
        with sharding.use_mesh(mesh):
            return run(parameters, x)

    def place(path, kernel):
        axes = (None, "tensor") if path[0].key != "out" else ("tensor", None)
        spread = kernel.ndim == 2 and (groups > 1 or path[0].key in ("query", "out"))
        spec = PartitionSpec(*axes) if spread else PartitionSpec()
        return jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, spec))

    cotangents = np.random.default_rng(2).standard_normal((4, 11, 32))
    arguments = (parameters, x), cotangents
    expected = numerics.run(numerics.with_gradients(run), *arguments, dtype="float32")
    found = numerics.run(numerics.with_gradients(run_on_mesh), *arguments, dtype="float32")
    numerics.assert_close(found, expected, 1e-5)


def test_one_key_head_is_on_every_device():
    for groups, axis in ((1, None), (2, "tensor")):
        config = small.config(pattern=("attention",), num_layers=1, num_heads=4, key_value_heads=groups)
        mesh = meshes.make_mesh(dict.fromkeys(meshes.AXES, 1) | {"tensor": 2, "data": 4})
        mixer = describe(config).shardings(mesh)["stacks"][0]["blocks"][0]["mixer"]
        assert mixer["key"]["kernel"].spec[-1] == mixer["value"]["kernel"].spec[-1] == axis
        assert mixer["query"]["kernel"].spec[-1] == "tensor"


@BOTH
def test_large_logits_are_not_rounded_to_bfloat16(mixer):
    """In a pass over all tokens and token by token. Logits are about 160 and close to each other; rounding them to bfloat16
    would put the weights off by a half."""
    config = small.config(dtype="bfloat16", num_heads=4, window=8, context=16, rotary_fraction=0.0)
    graph, parameters = small.module(lambda rngs: mixer(config, rngs=rngs))
    parameters["query"]["kernel"] = 40 + parameters["query"]["kernel"]
    parameters["key"]["kernel"] = 2 + 0.2 * parameters["key"]["kernel"]
    parameters = jax.tree.map(numerics.representable, parameters)
    x = np.eye(16)[None, :13]  # their queries, keys and values are exact in bfloat16
    oracle = ORACLES["attention" if mixer is Attention else "sliding_window"]
    expected = oracle(parameters, x, None, config)
    made = nnx.merge(graph, numerics.cast(parameters, "float32"))
    run, x = numerics.jit(lambda x, state: made(x, state=state)), numerics.cast(x, "bfloat16")
    whole, _ = run(x, None)
    parts, state = [], made.init_state(1)
    for t in range(x.shape[1]):
        y, state = run(x[:, t : t + 1], state)
        parts.append(y)
    numerics.assert_close(whole, expected, 2e-2)
    numerics.assert_close(jnp.concatenate(parts, axis=1), expected, 2e-2)
