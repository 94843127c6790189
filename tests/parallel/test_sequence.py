"""The operations with time spread over 8 devices: outputs, last states and gradients equal those of one, in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import cross_entropy, protocol
from jaxlinear.ops.delta_rule.op import DeltaRule
from jaxlinear.ops.delta_rule.op import Inputs as DeltaInputs
from jaxlinear.parallel import exchanges, operations, sharding
from jaxlinear.parallel.sequence import ShardedTime
from tests import numerics
from tests.shards import IDS, MESHES, T, make_mesh

B, H, K, V = 4, 2, 3, 5


def random_inputs(kind, decay, seed=0):
    random = np.random.default_rng(seed)
    normal, uniform = random.standard_normal, functools.partial(random.uniform, 0, 1)
    if kind == "linear_recurrence":
        shape = (6,) if "constant" in decay else (B, T, 6)
        a, x, state = uniform(shape), normal((B, T, 6)), normal((B, 6))
        if "complex" in decay:
            a, x, state = a * np.exp(1j * uniform(shape)), x + 1j * normal(x.shape), state + 1j * normal(state.shape)
        return a, x, state
    if kind == "selective_scan":
        x, B_, C = (normal((B, T, size)) for size in (6, K, K))
        rates = (-3 * uniform((6, K)),) if decay == "rates" else ()
        return x, uniform(x.shape) / (1 + np.sum(B_**2, axis=-1, keepdims=True)), B_, C, normal((B, 6, K)), *rates
    k = normal((B, T, H, K))
    inputs = [normal((B, T, H, K)), k / np.linalg.norm(k, axis=-1, keepdims=True), normal((B, T, H, V))]
    if kind == "delta_rule":
        inputs.append(uniform((B, T, H)))
    shapes = {"constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, K)}
    return (*inputs, normal((B, H, K, V)), *([-3 * uniform(shapes[decay])] if decay != "none" else []))


def call(module, kind, ids):
    """The operation of ``module``; its decay, if it has one, is the last input."""

    def run(*inputs):
        if kind == "linear_recurrence":
            return module.linear_recurrence(*inputs, segment_ids=ids)
        if kind == "selective_scan":
            x, dt, B_, C, state, *rates = inputs
            return module.selective_scan(x, dt, rates[0] if rates else None, B_, C, state, segment_ids=ids)
        count = 4 if kind == "delta_rule" else 3
        decay = inputs[count + 1] if len(inputs) > count + 1 else None
        operation = getattr(module, kind)
        return operation(*inputs[:count], decay, inputs[count], segment_ids=ids, chunk_size=3)

    return run


def compare(whole, spread, inputs, mesh, tolerance=1e-12):
    """Asserts that ``spread`` on the mesh gives what ``whole`` gives on one device."""
    random = np.random.default_rng(1)
    with jax.enable_x64(True):
        outputs = jax.eval_shape(whole, *numerics.cast(inputs, "float64"))
    cotangents = jax.tree.map(
        lambda y: numerics.normal(random, *y.shape, complex_=jnp.issubdtype(y.dtype, jnp.complexfloating)), outputs
    )
    expected = numerics.run(numerics.with_gradients(whole), inputs, cotangents, dtype="float64")
    with sharding.use_mesh(mesh):
        found = numerics.run(numerics.with_gradients(spread), inputs, cotangents, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), tolerance)


FAMILIES = [
    *(("linear_attention", decay) for decay in ("none", "constant", "scalar", "channel")),
    *(("delta_rule", decay) for decay in ("none", "scalar", "channel")),
    *(("linear_recurrence", decay) for decay in ("in_time", "constant", "complex", "complex_constant")),
    *(("selective_scan", decay) for decay in ("rates", "of_keys")),
]


@pytest.mark.parametrize("kind, decay", FAMILIES, ids=lambda name: name)
def test_recurrences(kind, decay):
    """The meshes rotate: each family runs on two of them, without packed documents on one and with them on the other."""
    place = FAMILIES.index((kind, decay))
    for packed in (False, True):
        mesh = make_mesh(MESHES[(place + packed) % len(MESHES)])
        with jax.enable_x64(True):
            ids = jnp.asarray(IDS) if packed else None
            compare(call(ops, kind, ids), call(operations, kind, ids), random_inputs(kind, decay), mesh)


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize("exchange", ["all_gather", "doubling"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_both_exchanges(sizes, exchange):
    """In this family M is a matrix, so the order of compositions matters."""
    q, k, v, beta, state, decay = random_inputs("delta_rule", "channel")
    family, mesh = DeltaRule(0.5), make_mesh(sizes)

    def whole(q, k, v, beta, decay, state):
        starts = ops.segments.starts(jnp.asarray(IDS))
        return protocol.chunked(family, 4, DeltaInputs(q, k, v, beta, decay, starts), None, state)

    def spread(q, k, v, beta, decay, state):
        time = ShardedTime(mesh, "heads", exchange)
        inputs = DeltaInputs(q, k, v, beta, decay, time.starts(jnp.asarray(IDS)))
        return time.run(family, 4, inputs, None, state)

    compare(whole, spread, (q, k, v, beta, decay, state), mesh)


@pytest.mark.parametrize("exchange", ["all_gather", "doubling"])
def test_constant_transitions_whose_axes_are_fewer(exchange):
    """A transition ``[P]`` for states ``[B, H, P]``, with one entry zero: the heads are spread, but it is not."""
    random = np.random.default_rng(6)
    a = np.array([0.9, 0.0, -0.7])
    inputs = a, random.standard_normal((B, T, 2, 3)), random.standard_normal((B, 2, 3))
    mesh = make_mesh(MESHES[2] if exchange == "all_gather" else MESHES[0])

    def spread(a, x, state):
        with sharding.use_mesh(mesh, exchange=exchange):
            return operations.linear_recurrence(a, x, state, segment_ids=jnp.asarray(IDS))

    def whole(a, x, state):
        return ops.linear_recurrence(a, x, state, segment_ids=jnp.asarray(IDS))

    compare(whole, spread, inputs, mesh)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_convolution(width):
    """The filter of width 7 spans two shards of 4."""
    random = np.random.default_rng(2)
    inputs = tuple(random.standard_normal(shape) for shape in ((B, T, 6), (width, 6), (6,), (B, width - 1, 6)))
    run = functools.partial(ops.causal_convolution, segment_ids=jnp.asarray(IDS))
    spread = functools.partial(operations.causal_convolution, segment_ids=jnp.asarray(IDS), channels="recurrent")
    compare(run, spread, inputs, make_mesh(MESHES[0]))


# Windows shorter than a shard, over several shards, and longer than the sequence, or None for all that is before; groups of
# keys; tokens of a past; ids, of which no 8 bits can equal the id of the positions before the sequence; mesh.
ATTENTION = {
    "window_1": (1, 1, 0, IDS, MESHES[1]),
    "in_a_shard": (4, 2, 0, IDS, MESHES[1]),
    "ids_of_few_bits": (4, 2, 0, np.uint8(IDS - IDS.min()), MESHES[0]),
    "over_shards": (11, 1, 0, IDS, MESHES[2]),
    "every_head": (11, 4, 0, IDS, MESHES[2]),
    "over_the_sequence": (50, 2, 0, IDS, MESHES[2]),
    "with_a_past": (9, 2, 8, IDS, MESHES[2]),
    "causal": (None, 1, 0, IDS, MESHES[0]),
    "causal_one_document": (None, 1, 0, None, MESHES[0]),
    "causal_with_a_past": (None, 2, 8, IDS, MESHES[2]),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    window, groups, past, ids, mesh = ATTENTION[name]
    random = np.random.default_rng(3)
    shapes = (B, T, 4, K), *((B, length, groups, width) for length in (past, T) for width in (K, V))
    kind, options = "causal_attention", {"scale": 0.3}
    if window is not None:
        kind, options = "sliding_window_attention", {"scale": 0.3, "window": window}
    past_ids = np.where(np.arange(past)[None] < np.array([[0], [3], [7], [8]]), operations.NO_DOCUMENT, IDS[:, :1])

    def whole(q, past_k, past_v, k, v):
        k, v = jnp.concatenate([past_k, k], axis=1), jnp.concatenate([past_v, v], axis=1)
        every = None if ids is None else jnp.asarray(np.concatenate([past_ids[:, :past], ids], axis=1), jnp.int32)
        return getattr(ops, kind)(q, k, v, segment_ids=every, **options)

    def spread(q, past_k, past_v, k, v):
        given = {"past": (past_k, past_v, jnp.asarray(past_ids, jnp.int32))} if past else {}
        own = None if ids is None else jnp.asarray(ids)
        return getattr(operations, kind)(q, k, v, segment_ids=own, **given, **options)

    compare(whole, spread, tuple(random.standard_normal(shape) for shape in shapes), make_mesh(mesh))


def test_losses():
    """With all their options, with time whole and with time spread. The cross-entropy has no gradient."""
    random = np.random.default_rng(7)
    x, embedding = random.standard_normal((B, T, 6)), random.standard_normal((11, 6))
    targets, weights = jnp.asarray(random.integers(0, 11, (B, T)), jnp.int32), jnp.asarray(random.uniform(0, 1, (B, T)))

    def losses(module):
        def run(x, embedding):
            sums = module.linear_cross_entropy(x, embedding, targets, weights.astype(x.dtype), soft_cap=2.0, z_loss=0.1)
            return *sums, module.token_losses(x, embedding, targets, soft_cap=2.0)

        return run

    for mesh in (make_mesh({"data": 2, "tensor": 4}), make_mesh(MESHES[0]), make_mesh(MESHES[2])):
        compare(losses(cross_entropy), losses(operations), (x, embedding), mesh, 1e-11)


def test_document_starts():
    with sharding.use_mesh(make_mesh(MESHES[1])):
        found = jax.jit(operations.document_starts)(jnp.asarray(IDS))
    assert np.array_equal(found, ops.segments.starts(jnp.asarray(IDS)))


@pytest.mark.parametrize(
    "kind, shape, options, message",
    [
        ("linear_recurrence", (1, 12, 2), {}, "mesh.sequence=8 does not divide 12 tokens; .* that works is 16"),
        ("linear_recurrence", (1, 16, 2), {"reverse": True}, "reverse=True does not run with time sharded"),
        (
            "linear_attention",
            (1, 16, 2, 2),
            {"backend": "recurrent"},
            "does not run over several devices; use 'chunked'",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused(kind, shape, options, message):
    inputs = [jnp.ones(shape)] * (2 if kind == "linear_recurrence" else 3)
    with sharding.use_mesh(make_mesh(MESHES[0])), pytest.raises(UserError, match=message):
        getattr(operations, kind)(*inputs, **options)


def collectives(function, structs):
    """The collectives in the compiled gradients of ``sum(function(**structs) ** 2)``: (name, shape of the result)."""

    def objective(inputs):
        return jnp.sum(jnp.abs(function(**inputs)) ** 2)

    places = jax.tree.map(lambda x: x.sharding, structs)
    text = jax.jit(jax.grad(objective), out_shardings=places).lower(structs).compile().as_text()
    found = re.findall(
        r" = \(?(\S+?)\{\S* (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)\(", text
    )
    return sorted((name, shape) for shape, name in found)


def structs_on(mesh, shapes, dtype=jnp.float32):
    """Structs on the mesh; those with three or more axes have their time spread over it."""

    def one(shape):
        spec = jax.P(None, "sequence") if len(shape) > 2 else jax.P()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    return {name: one(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind, decay", [("linear_attention", "channel"), ("delta_rule", "scalar")])
def test_one_collective_a_pass_whose_size_does_not_grow_with_time(kind, decay):
    """In the compiled program: an all-gather forward and one backward, with as many bytes at 64 tokens as at 1,024."""
    mesh = make_mesh(MESHES[0])

    def of_length(length):
        shapes = {"q": (B, length, H, K), "k": (B, length, H, K), "v": (B, length, H, V)}
        if kind == "delta_rule":
            shapes["beta"] = (B, length, H)
        shapes["log_decay"] = (B, length, H) if decay == "scalar" else (B, length, H, K)

        def run(**inputs):
            with sharding.use_mesh(mesh):
                return getattr(operations, kind)(**inputs)[0]

        return collectives(run, structs_on(mesh, shapes))

    m, c = B * H * K * (K if kind == "delta_rule" else 1), B * H * K * V
    expected = [("all-gather", gathered_floats(size)) for size in (m + c, c)]
    assert sorted(expected) == of_length(64) == of_length(1024)


def gathered_floats(size):
    return f"f32[8,{-(-size // exchanges.LANES) * exchanges.LANES}]"


@pytest.mark.parametrize("dtype, parts", [(jnp.float32, 1), (jnp.complex64, 2)])
def test_of_constant_transitions_the_state_alone_travels(dtype, parts):
    """One number per row goes with it, which makes M zero where a document ends; the same under remat."""
    mesh, width = make_mesh(MESHES[0]), 96
    policy = jax.checkpoint_policies.save_only_these_names(exchanges.EXCHANGED)

    def run(a, x):
        with sharding.use_mesh(mesh):
            ids = jnp.zeros(x.shape[:2], jnp.int32)
            recur = jax.checkpoint(lambda a, x: operations.linear_recurrence(a, x, segment_ids=ids)[0], policy=policy)
            return recur(a, x)

    def gathered(a):
        found = collectives(run, structs_on(mesh, {"a": a, "x": (B, 64, width)}, dtype))
        return [shape for name, shape in found if name == "all-gather"]

    state, row = parts * B * width, parts * B
    assert gathered((width,)) == sorted(map(gathered_floats, (state, state + row)))
    assert gathered((B, 64, width)) == sorted(map(gathered_floats, (state, 2 * state)))
