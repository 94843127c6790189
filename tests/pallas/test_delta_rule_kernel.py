"""The delta rule's kernels, interpreted, against the oracles: values, last states and all gradients, on the inputs of the
operation's tests."""

import functools
import itertools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear import log_once
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, delta_rule, protocol
from jaxlinear.ops.delta_rule.family import DeltaRuleKernel
from jaxlinear.ops.delta_rule.op import DeltaRule, Inputs, choose
from jaxlinear.pallas.delta_rule import blocks
from jaxlinear.pallas.parts import inverse
from jaxlinear.pallas.parts.target import Target
from tests import numerics
from tests.ops import test_delta_rule as operation

INTERPRETED = Target("tpu", "none", True)
# Chunks of 16 tokens are one block of the inverse, chunks of 64 take two steps of doubling.
RUNS = [
    ("one_token", "float64", None),
    ("short", "float64", 64),
    ("none", "float64", 16),
    ("none_long", "float64", None),
    ("scalar", "float64", 128),
    ("channel", "float64", None),
    ("scalar_whole", "float32", None),
    *((name, "bfloat16", 64) for name in ("none", "scalar")),
    ("channel", "bfloat16", 16),  # a program for each way of the decays, which XLA compiles slowly in longer chunks
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several chunks."""
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", blocks.Block(32, 32, 256))


def run_kernel(ids, target, q, k, v, beta, log_decay, state, chunk=None, negative_eigenvalues=False):
    starts = None if ids is None else protocol.UNSHARDED.starts(jnp.asarray(ids))
    wide = np.promote_types(state.dtype, np.float32)
    family = DeltaRuleKernel(q.shape[-1] ** -0.5, chunk, target, negative_eigenvalues)
    return family.through(Inputs(q, k, v, beta, log_decay, starts), state.astype(wide))


def check(name, dtype, target=INTERPRETED, chunk=None, **options):
    inputs, cotangents, ids, outputs, gradients = operation.case(name)
    run = functools.partial(run_kernel, ids, target, chunk=chunk, **options)
    found, found_gradients = numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert {y.dtype for y in jax.tree.leaves((found[0], found_gradients))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name, dtype, chunk", RUNS)
def test_values_and_gradients(name, dtype, chunk):
    check(name, dtype, chunk=chunk)


@pytest.mark.slow(but=["512-of_blocks1"])
@pytest.mark.parametrize("lanes, of_blocks", [(128, [2, 2]), (512, [3, 2])])
def test_blocks_of_some_heads(monkeypatch, lanes, of_blocks):
    """Of three heads, the last block may have one; the forward pass takes more at once than the gradient."""
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", blocks.Block(32, 32, lanes))
    assert [blocks.heads_of("", 3, 64, 64, forward) for forward in (True, False)] == of_blocks
    check_heads(3, lanes, "scalar")


@pytest.mark.slow(but=["3-scalar"])
@pytest.mark.parametrize("together, decay", [(1, "channel"), (3, "scalar")])
def test_a_block_of_heads_in_groups(monkeypatch, together, decay):
    """Two groups share a register."""
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", blocks.Block(32, 32, 1024))
    monkeypatch.setattr(blocks.Heads, "together", lambda _: together)
    assert blocks.heads_of("", 5, 64, 64) == 4
    check_heads(5, together, decay)


def check_heads(heads, seed, decay):
    random = np.random.default_rng(seed)
    q, k, v = (numerics.normal(random, 1, 50, heads, 64) for _ in range(3))
    beta, log_decay = numerics.uniform(random, 1, 50, heads), operation.draw_decay(random, decay, 1, 50, heads, 64)
    inputs = q, operation.unit(k), v, beta, log_decay, numerics.normal(random, 1, heads, 64, 64)
    cotangents = numerics.normal(random, *v.shape), numerics.normal(random, *inputs[5].shape)
    expected = numerics.run(operation.reference(False), inputs, cotangents, dtype="float64")
    run = numerics.with_gradients(functools.partial(run_kernel, None, INTERPRETED))
    numerics.assert_close(numerics.run(run, inputs, cotangents, dtype="float32"), expected, 1e-5)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_states_of_bfloat16_are_float32(kind):
    operation.assert_states_are_float32(functools.partial(run_kernel, None, INTERPRETED), kind)


def test_on_a_simulated_tpu():
    """With TPU memories and copies; reads beyond an array or of unwritten memory give NaN."""
    target = Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan"))
    check("short_channel", "float32", target)
    check("short", "bfloat16", target, negative_eigenvalues=True)


def check_without_outputs(name, target):
    """The map of a run, and the gradient of the state alone."""
    inputs, cotangents, ids, outputs, gradients = operation.case(name)
    family = DeltaRuleKernel(inputs[0].shape[-1] ** -0.5, None, target)

    @numerics.jit
    def both(inputs, d_o, d_final):
        *arrays, state = inputs
        run = Inputs(*arrays, None if ids is None else protocol.UNSHARDED.starts(jnp.asarray(ids)))
        return family.advance(family.summary(run), state), family.state_gradient(run, d_o, d_final)

    found = numerics.run(both, inputs, *cotangents, dtype="float64")
    numerics.assert_close(found, (outputs[1], gradients[5]), 1e-10)


@pytest.mark.parametrize("name", ["none_long", "channel"])
def test_a_run_without_its_outputs(name):
    check_without_outputs(name, INTERPRETED)


# Inputs at the limits


@functools.cache
def in_float32(packed):
    ids = np.arange(100)[None] if packed else None
    return numerics.with_gradients(functools.partial(run_kernel, ids, INTERPRETED))


def assert_right_in_float32(inputs, packed=False, tolerance=1e-5):
    random = np.random.default_rng(3)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[5].shape)
    expected = numerics.run(operation.reference(packed), inputs, cotangents, dtype="float64")
    found = numerics.run(in_float32(packed), inputs, cotangents, dtype="float32")
    numerics.assert_close(found, expected, tolerance)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_hard_decays(kind):
    """Decays strong and weak in one chunk, equal for all, or weak only at a chunk's end; equal keys; reflections."""
    hard = [
        lambda random, shape: random.choice([-50.0, -1e4, -1e-7, -1e-3, 0.0], shape),
        *(lambda _, shape, value=value: np.full(shape, value) for value in (-1e-7, -50.0, -np.inf)),
    ]
    for draw in hard:
        assert_right_in_float32(operation.at_the_limits(kind, draw))
    inputs = operation.at_the_limits(kind, hard[2])
    inputs[4][:, 50:] = -0.01
    assert_right_in_float32(inputs)
    q, k, *rest = operation.at_the_limits(kind, lambda random, shape: -random.uniform(0, 0.01, shape), 2.0)
    k = np.zeros_like(k)
    k[..., 1] = 1
    assert_right_in_float32((q, k, *rest), tolerance=5e-5)


def test_hard_keys():
    q, k, v, beta, _, state = operation.at_the_limits("none", beta=1.0)
    near = k[:, :1] + 1e-3 * k
    near = near / np.linalg.norm(near, axis=-1, keepdims=True)
    for keys in (k[:, :1] + np.zeros_like(k), near.astype(np.float32).astype(np.float64), 0 * k):
        assert_right_in_float32((q, keys, v, beta, None, state))


@pytest.mark.parametrize("kind", ["channel"])
def test_one_document_a_token(kind):
    inputs = operation.at_the_limits(kind, lambda random, shape: -random.uniform(0, 1, shape))
    assert_right_in_float32(inputs, packed=True)


def keys_of_one_sign():
    """q, k, v and beta ``[1, 128, 1, 16]`` for which the inverse's entries cancel; and outputs and state, in float64."""
    random = np.random.default_rng(3)
    common, own = (operation.unit(random.standard_normal((1, length, 1, 16))) for length in (1, 128))
    keys = operation.unit(0.9 * common + np.sqrt(1 - 0.9**2) * own)
    q, v = (numerics.normal(random, *keys.shape) for _ in range(2))
    inputs = q, keys, v, numerics.uniform(random, 1, 128, 1, high=1.9)
    run = numerics.jit(functools.partial(delta_rule, backend="recurrent"))
    return inputs, numerics.wide(numerics.run(run, *inputs, dtype="float64"))


def test_keys_alike_in_bfloat16():
    """With the inverse computed in bfloat16, the error would be 3%."""
    inputs, expected = keys_of_one_sign()
    run = numerics.jit(functools.partial(delta_rule, chunk_size=128, backend="pallas"))
    numerics.assert_close(numerics.run(run, *inputs, dtype="bfloat16"), expected, 2e-2)


def inverse_of(lower, count):
    def kernel(x, y):
        y[...] = inverse.inverses([x[...]], jnp.bfloat16, count)[0]

    shape = jax.ShapeDtypeStruct(lower.shape, jnp.float32)
    return np.asarray(pl.pallas_call(kernel, out_shape=shape, interpret=True)(lower))


def test_inverses_to_16_bits_of_unlike_blocks():
    """Of the blocks of 16 rows only the last differs from the identity, so between the others the inverse has the entries
    of -``lower`` itself, which are a factor in two bfloat16 terms and so keep 16 bits."""
    lower = np.tril(np.random.default_rng(0).standard_normal((128, 128)), -1).astype(np.float32)
    block = np.arange(128) // 16
    lower[(block[:, None] == block) & (block < 7)] = 0
    lower[block[:, None] > block + 1 - block % 2] = 0  # one step of doubling
    found, last_counts = inverse_of(lower, 1), slice(96)
    numerics.assert_close(found[last_counts, last_counts], (np.eye(128) - lower)[last_counts, last_counts], 2**-16)


def test_inverses_in_two_terms():
    """For keys that are alike and beta = 2: numbers from -2 to 2, from sums of many such numbers."""
    random = np.random.default_rng(0)
    keys = operation.unit(random.standard_normal((1, 16)) + 0.1 * random.standard_normal((128, 16)))
    lower = np.tril(2 * keys @ keys.T, -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(128) + lower)
    numerics.assert_close(inverse_of(lower, 2), expected, 5e-3)
    assert np.max(np.abs(inverse_of(lower, 1) - expected)) > 0.05


def alike(keys, beta, decay, width):
    """Inputs of the delta rule, and cotangents: one key, varied per token as ``keys`` says; beta is 2, from 1.9 to 2, or
    alternately 2 and 0.1."""
    random, length = np.random.default_rng(1), 150
    q, v, own = (numerics.normal(random, 1, length, 1, width) for _ in range(3))
    turns = (-1.0) ** np.arange(length)[None, :, None]
    one = random.standard_normal((1, 1, 1, width)) * (turns[..., None] if keys == "turned" else 1)
    k = operation.unit(one + {"near": 0.01}.get(keys, 0) * own)
    betas = {
        "2": 2 + 0 * turns,
        "1.9": numerics.uniform(random, 1, length, 1, low=1.9, high=2),
        "turns": 1.05 + 0.95 * turns,
    }
    shape = {"none": None, "scalar": turns.shape, "channel": q.shape}[decay]
    log_decay = None if shape is None else numerics.representable(-random.uniform(0, 0.02, shape))
    state, d_o, d_state = (numerics.normal(random, *s) for s in ((1, 1, width, width), v.shape, (1, 1, width, width)))
    return (q / 8, k, v, betas[beta], log_decay, state), (d_o, d_state)


def check_alike(keys, beta, decay, packed, target, chunk=None, width=32):
    """In bfloat16, with beta and the decays in float32: no output or gradient is much further off than with ``chunked``,
    which solves in float32."""
    inputs, cotangents = alike(keys, beta, decay, width)
    ids = np.repeat([[0, 1, 2]], [5, 120, 25], axis=1).astype(np.int32) if packed else None
    by_kernel = functools.partial(run_kernel, ids, target, chunk=chunk, negative_eigenvalues=True)
    runs = [functools.partial(delta_rule, segment_ids=ids, backend=backend) for backend in ("recurrent", "chunked")]
    expected = numerics.wide(numerics.run(numerics.with_gradients(runs[0]), inputs, cotangents, dtype="float64"))
    narrow = [
        x if x is None else jnp.asarray(x, dtype)
        for x, dtype in zip(inputs, ["bfloat16"] * 3 + ["float32"] * 3, strict=True)
    ]

    def errors(run):
        found = numerics.wide(numerics.with_gradients(run)(narrow, cotangents))
        pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
        return np.array([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs])

    in_chunks, found = errors(runs[1]), errors(by_kernel)
    assert (found < 2 * in_chunks + 0.005).all(), (found.round(3), in_chunks.round(3))


ALIKE = [
    ("same", "2", "none", False),
    ("near", "1.9", "scalar", True),
    ("turned", "2", "channel", False),
    ("near", "turns", "none", True),
]


@pytest.mark.slow(cases=["turned-2-channel-False"])  # half a minute to compile; on GPU it is always taken
@pytest.mark.parametrize("keys, beta, decay, packed", ALIKE)
def test_negative_eigenvalues(keys, beta, decay, packed):
    check_alike(keys, beta, decay, packed, INTERPRETED, chunk=128)


# What is chosen and what is refused


def test_one_kernel_each_way():
    x, beta = jnp.ones((1, 40, 1, 4)), jnp.ones((1, 40, 1))
    run = functools.partial(delta_rule, backend="pallas")
    objective = lambda q, k, v: jnp.sum(run(q, k, v, beta)[0] ** 2)  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(objective, (0, 1, 2)))(x, x, x))
    assert re.findall(r" name=(delta_rule_\w+)", text) == ["delta_rule_forward", "delta_rule_gradient"]
    # For the state's gradient alone, nothing as long as the sequence is kept or written.
    of_state = jax.grad(lambda state: jnp.sum(run(x, x, x, beta, -x, state)[0]))
    text = str(jax.make_jaxpr(of_state)(jnp.ones((1, 1, 4, 4))))
    names = ["delta_rule_forward_channel", "delta_rule_state_gradient_channel"]
    assert re.findall(r" name=(delta_rule_\w+)", text) == names


def test_the_family_of_the_kernel_in_pieces():
    """Runs in sequence, and their gradients; that of the state is from the kernel that computes nothing else."""
    random = np.random.default_rng(2)
    q, k, v, state = (random.standard_normal(shape) for shape in (*[(1, 24, 1, 3)] * 2, (1, 24, 1, 2), (1, 1, 3, 2)))
    beta, log_decay = random.uniform(0, 1, (2, 1, 24, 1)) * np.array([1, -1]).reshape(2, 1, 1, 1)
    starts = np.zeros((1, 24), bool)
    starts[0, 5] = True
    cotangents = random.standard_normal(v.shape), random.standard_normal(state.shape)

    def pieces(family):
        def run(*inputs):
            return protocol.chunked(family, 12, Inputs(*inputs[:5], jnp.asarray(starts)), None, inputs[5])

        inputs = q, k / 2, v, beta, log_decay, state
        return numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype="float64")

    by_kernel = pieces(DeltaRuleKernel(0.5, None, INTERPRETED))
    numerics.assert_close(by_kernel, numerics.wide(pieces(DeltaRule(0.5))), 1e-12)


def test_auto_takes_it_where_it_runs(caplog):
    q = jnp.ones((1, 9, 2, 16), jnp.bfloat16)
    with jax.enable_x64(True):
        double = jnp.ones((1, 9, 2, 16), jnp.float64)
    assert numerics.form(choose, "auto", q, q, q) == "chunked"
    log_once._logged.clear()
    with backends.use_platform("tpu", "some kind"), caplog.at_level(logging.INFO, logger="jaxlinear"):
        assert (
            numerics.form(choose, "auto", q, q, q)
            == numerics.form(choose, "pallas", q, q, q, chunk_size=64)
            == "pallas"
        )
        assert numerics.form(choose, "auto", q[:, :8], q[:, :8], q[:, :8]) == "recurrent"
        assert numerics.form(choose, "auto", double, double, double) == "chunked"
        assert numerics.form(choose, "chunked", q, q, q) == "chunked"
    said = "delta_rule runs as 'chunked', not as a kernel: the kernel takes float32 and bfloat16, not float64"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize(
    "shapes, chunk, reason",
    [
        (
            (16, 248, 248),
            None,
            "has 64 MiB of VMEM and would need about 70 for 16 heads with K, V = .248, 248.",
        ),
        ((2, 8, 16), None, "K from 16 to 256 and V of at least 16, not K = 8"),
        ((2, 16, 257), None, "V in equal parts of at most 256, and V = 257 cannot be split that way"),
        ((64, 20, 20), None, "at most 16 heads at a time, and 64 heads with K, V = .20, 20. need 32 to fill registers"),
        ((2, 16, 16), 48, "chunks of a power of two from 16 to 128 tokens, not of 48"),
        ((2, 16, 16), 256, "chunks of a power of two from 16 to 128 tokens, not of 256"),
    ],
)
def test_what_it_does_not_take_is_refused(shapes, chunk, reason):
    heads, keys, values = shapes
    q, v, beta = jnp.ones((1, 9, heads, keys)), jnp.ones((1, 9, heads, values)), jnp.ones((1, 9, heads))
    with backends.use_platform("tpu", "TPU v5 lite"), pytest.raises(UserError) as error:
        delta_rule(q, q, v, beta, -q, chunk_size=chunk, backend="pallas")
    assert re.fullmatch(rf"delta_rule: the kernel (takes )?{reason}.*; use backend='chunked'", str(error.value))


def test_what_vmem_holds_depends_on_the_decay():
    q = jnp.ones((1, 9, 16, 248))
    with backends.use_platform("tpu", "TPU v5 lite"):
        assert numerics.form(choose, "auto", q, q, q) == "pallas"
        assert numerics.form(choose, "auto", q, q, q, log_decay=q) == "chunked"
        narrow = q.astype(jnp.bfloat16)
        assert numerics.form(choose, "auto", narrow, narrow, narrow, log_decay=q) == "pallas"


# Heads of a block, K, V, bytes per number, whether decays are by channel; MiB that the gradient compiled for v5e takes with
# B = 8, T = 4,000, documents and all heads at once; and how many fit at once.
VMEM = [
    ((8, 128, 128, 4, True), 56.1, 8),
    ((4, 256, 256, 4, True), 61.4, 4),
    ((13, 24, 24, 4, True), 63.5, 7),
    ((16, 16, 200, 4, True), 122.5, 6),
    ((9, 200, 400, 2, True), 73.5, 5),
    ((8, 80, 80, 2, True), 23.5, 8),
    ((5, 200, 200, 4, False), 40.0, 5),
    ((16, 16, 200, 4, False), 77.8, 8),
    ((9, 200, 400, 2, False), 43.9, 9),
    ((8, 64, 64, 2, False), 10.4, 8),
]


@pytest.mark.parametrize("sizes, measured, together", VMEM)
def test_what_heads_take_of_vmem(sizes, measured, together):
    block = blocks.Heads(*sizes)
    assert 1 <= block.vmem(block.heads) / (measured * 2**20) < 1.35
    assert block.together() == together


@pytest.mark.parametrize(
    "sizes, measured, together",
    [
        ((16, 248, 248, 4, False), 65.5, 8),
        ((16, 248, 496, 2, False), 61.9, 6),
        ((16, 168, 256, 4, True), 56.2, 8),
        ((16, 200, 208, 4, False), 52.4, 16),
        ((8, 256, 256, 4, True), 30.8, 8),
    ],
)
def test_what_heads_take_of_vmem_forward(sizes, measured, together):
    """The same for the forward pass, where decays not by channel were by head or none."""
    block = blocks.Heads(*sizes, is_gradient=False)
    assert 1 <= block.vmem(block.heads) / (measured * 2**20) < 1.35
    assert block.together() == together


def test_the_map_of_a_run_has_no_gradient():
    x, family = jnp.ones((1, 5, 1, 2)), DeltaRuleKernel(1.0, None, INTERPRETED)
    inputs = lambda k: Inputs(x, k, x, x[..., 0], None, None)  # noqa: E731
    with pytest.raises(UserError, match="the kernel has no gradient for the map of a run"):
        jax.grad(lambda k: jnp.sum(family.summarise(family.prepare(inputs(k), None))[1]))(x)


@pytest.mark.parametrize("heads, keys, values", [(16, 64, 64), (6, 128, 256), (5, 96, 192), (40, 16, 16), (1, 100, 20)])
def test_blocks_of_heads(heads, keys, values):
    """Blocks fill whole lane registers, or have all heads, and never too many."""
    for kind, forward in itertools.product(("", "TPU v5 lite"), (False, True)):
        count = blocks.heads_of(kind, heads, keys, values, forward)
        assert count == heads or count * keys % 128 == count * values % 128 == 0
        assert count <= blocks.HEADS


def test_many_narrow_heads_take_several_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", blocks.TPU["TPU v5 lite"])
    q = jnp.ones((1, 9, 40, 16))
    with backends.use_platform("tpu", "TPU v5 lite"):
        assert numerics.form(choose, "auto", q, q, q) == "pallas"
