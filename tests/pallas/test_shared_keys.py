"""Queries and keys that all heads share, as in Mamba-2: the results are as if each head had its own copy, but kernels read
only one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, linear_attention, matrix_states
from jaxlinear.ops.linear_attention.op import LINEAR_ATTENTION, choose
from jaxlinear.pallas.linear_attention import blocks
from jaxlinear.pallas.parts.target import Target
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.ops import test_linear_attention as operation
from tests.pallas import test_linear_attention_compiles as compiles
from tests.pallas import test_linear_attention_kernel as kernel
from tests.shards import FOUR, IDS, TWO, T, make_mesh

B = 4


def draw(decay, length, heads, keys, values, batch=1):
    random = np.random.default_rng(0)
    q, k = (numerics.normal(random, batch, length, 1, keys) for _ in range(2))
    v, state = (numerics.normal(random, *s) for s in ((batch, length, heads, values), (batch, heads, keys, values)))
    inputs = q, k, v, operation.draw_decay(random, decay, batch, length, heads, keys), state
    return inputs, (numerics.normal(random, *v.shape), numerics.normal(random, *state.shape))


def of_every_head(run):
    """``run`` on queries and keys that are repeated for every head."""

    def whole(q, k, v, *rest):
        q, k = (jnp.broadcast_to(x, (*x.shape[:2], v.shape[2], x.shape[3])) for x in (q, k))
        return run(q, k, v, *rest)

    return whole


def compare(run, reference, inputs, cotangents, tolerance=1e-10):
    found, expected = (
        numerics.run(numerics.with_gradients(x), inputs, cotangents, dtype="float64") for x in (run, reference)
    )
    assert found[1][0].shape == inputs[0].shape and found[1][1].shape == inputs[1].shape
    numerics.assert_close(found, numerics.wide(expected), tolerance)


@pytest.mark.parametrize(
    "backend, decay, heads",
    [
        # In blocks of 2 heads, of 5, or of all three.
        *(("pallas", decay, heads) for decay, heads in (("none", 3), ("constant", 10), ("scalar", 10), ("channel", 2))),
        *(("recurrent", "scalar", 3), ("chunked", "constant", 3), ("chunked", "channel", 2)),
    ],
)
def test_values_and_gradients(monkeypatch, backend, decay, heads):
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", (blocks.Block(64, 32, 1),) * 2)
    inputs, cotangents = draw(decay, 70, heads, 6, 64)
    ids = np.repeat([[0, 1, 2]], [5, 40, 25], axis=1).astype(np.int32)
    run = functools.partial(linear_attention, segment_ids=ids, backend=backend)
    reference = of_every_head(functools.partial(linear_attention, segment_ids=ids, backend="recurrent"))
    compare(run, reference, inputs, cotangents)


GPU = Target("gpu", "none", True)


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize(
    "decay, heads, keys, values",
    # Gradients of q and k in one part; in two, of five heads and of five and four; by several tiles, the last not whole.
    [("none", 3, 6, 5), ("constant", 10, 6, 5), ("scalar", 9, 6, 5), ("scalar", 3, 40, 50), ("channel", 2, 6, 5)],
)
@pytest.mark.parametrize("packed", [True, False])
def test_on_gpu(monkeypatch, decay, heads, keys, values, packed):
    monkeypatch.setattr(backends, "target", lambda: GPU)
    monkeypatch.setattr(blocks, "gpu", lambda *_: blocks.GPUBlock(16, 16, 16, 32, 32, 16, 32))
    inputs, cotangents = draw(decay, 40, heads, keys, values, batch=2)
    ids = np.repeat([[0, 1, 2], [0, 0, 1]], [5, 27, 8], axis=1).astype(np.int32) if packed else None
    run = functools.partial(linear_attention, segment_ids=ids, backend="pallas")
    reference = of_every_head(functools.partial(linear_attention, segment_ids=ids, backend="recurrent"))
    compare(run, reference, inputs, cotangents)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("sizes", [{"data": 8}, FOUR, TWO], ids=str)
def test_no_array_is_of_every_head(monkeypatch, platform, sizes):
    """Neither kernel inputs, nor what is kept for the backward pass, nor gradients, which are per group of heads."""
    monkeypatch.setattr(backends, "target", lambda: Target(platform, "none", True))
    heads, keys, values, length = 16, 32, 48, 128
    (q, k, v, decay, state), cotangents = draw("scalar", length, heads, keys, values)
    q, k, v, decay, state = (jnp.asarray(x, jnp.float32) for x in (q, k, v, decay, state))

    def gradient(q, k, v, decay, state):
        run = functools.partial(operations.linear_attention, backend="pallas")
        outputs, pullback = jax.vjp(run, q, k, v, decay, state)
        return pullback(tuple(x.astype(y.dtype) for x, y in zip(cotangents, outputs, strict=True)))

    with sharding.use_mesh(make_mesh(sizes)):
        text = str(jax.make_jaxpr(gradient)(q, k, v, decay, state))
    mesh = {"sequence": 1, "tensor": 1} | sizes
    own_length, own_heads = length // mesh["sequence"], heads // mesh["tensor"]
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    in_time = {shape[1:] for shape in shapes if shape[:2] in ((1, length), (1, own_length))}
    assert (own_length, 1, keys) in in_time and (own_length, own_heads, values) in in_time
    of_every_head = {n * keys * t for n in (heads, own_heads) for t in (length, own_length)}
    assert not of_every_head & {math.prod(shape) for shape in in_time}


def test_on_a_simulated_tpu():
    """Reads beyond an array or of unwritten memory give NaN, also for a head after the last."""
    inputs, cotangents = draw("scalar", 40, 3, 6, 64)
    target = Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan"))
    found = numerics.run(
        numerics.with_gradients(functools.partial(kernel.run_kernel, None, target)), inputs, cotangents, dtype="float32"
    )
    reference = numerics.with_gradients(of_every_head(functools.partial(linear_attention, backend="recurrent")))
    expected = numerics.run(reference, inputs, cotangents, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), 1e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_gradient_of_the_state_alone(monkeypatch, platform):
    monkeypatch.setattr(backends, "target", lambda: Target(platform, "none", True))
    (q, k, v, decay, state), (d_o, _) = draw("scalar", 20, 10, 6, 64)
    with jax.enable_x64(True):
        of_state = [
            jax.grad(lambda state, run=run: jnp.sum(run(*map(jnp.asarray, (q, k, v, decay)), state)[0] * d_o))(state)
            for run in (
                functools.partial(linear_attention, backend="pallas"),
                of_every_head(functools.partial(linear_attention, backend="recurrent")),
            )
        ]
    numerics.assert_close(*of_state, 1e-10)


MESHES = [
    ({"data": 4, "tensor": 2}, "pallas", "scalar", 4),
    ({"fsdp": 8}, "pallas", "scalar", 4),
    *((FOUR, "pallas", decay, 4) for decay in ("scalar", "channel")),
    # A device has all three heads, which cannot be divided; two; one.
    *((TWO, "pallas", decay, heads) for decay, heads in (("scalar", 3), ("scalar", 4), ("constant", 2))),
    (TWO, "chunked", "scalar", 4),
]


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("sizes, backend, decay, heads", MESHES, ids=str)
def test_on_a_mesh(monkeypatch, short_chunks, sizes, backend, decay, heads, platform):
    """Heads are spread, and their gradients of queries and keys summed; rows and time are spread, too."""
    monkeypatch.setattr(backends, "target", lambda: Target(platform, "none", True))
    inputs, cotangents = draw(decay, T, heads, 6, 8, batch=8 if sizes == {"fsdp": 8} else B)
    ids = np.concatenate([IDS, IDS[::-1]])[: len(inputs[0])]
    run = functools.partial(operations.linear_attention, segment_ids=ids, backend=backend)
    reference = of_every_head(functools.partial(ops.linear_attention, segment_ids=ids, backend="recurrent"))
    with sharding.use_mesh(make_mesh(sizes)):
        compare(run, reference, inputs, cotangents)


def test_the_gradient_of_a_shared_key_is_summed_over_heads_in_float32():
    """In bfloat16 a sum of ones stops growing at 256."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    y, pullback = jax.vjp(lambda x: matrix_states.for_every_head(x, 1024), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pullback(jnp.ones_like(y))[0], 1024)
    sums = [
        eqn.invars[0].aval for eqn in jax.make_jaxpr(pullback)(jnp.ones_like(y)).eqns if "sum" in eqn.primitive.name
    ]
    assert [summed.dtype for summed in sums if 1024 in summed.shape] == [jnp.float32]


@pytest.mark.parametrize("decay, backend", [("scalar", "pallas"), ("channel", "chunked")])
def test_heads_are_refused_as_they_reach_the_kernel(decay, backend):
    """With shared keys only V must fill registers; with keys repeated for every head, K must as well. Two kernels share V
    here, so that there are no channels of zeros."""
    q, v = (jnp.zeros((1, 9, *shape), jnp.bfloat16) for shape in ((1, 24), (12, 1024)))
    log_decay = jnp.zeros((1, 9, 12) if decay == "scalar" else (1, 9, 12, 24))
    with backends.use_platform("tpu", "TPU v5 lite"):
        form = choose(q, q, v, log_decay)
        arrays = LINEAR_ATTENTION.complete({"q": q, "k": q, "v": v, "log_decay": log_decay}, form)
    assert form.name == backend
    assert arrays["q"].shape == arrays["k"].shape == (1, 9, 1 if backend == "pallas" else 12, 24)


def test_the_delta_rule_takes_none():
    q, v, beta = jnp.ones((1, 9, 1, 4)), jnp.ones((1, 9, 2, 4)), jnp.ones((1, 9, 2))
    with pytest.raises(UserError, match=r"delta_rule: values \(1, 9, 2, 4\) do not fit queries \(1, 9, 1, 4\)"):
        ops.delta_rule(q, q, v, beta)
    with sharding.use_mesh(make_mesh({"data": 8})), pytest.raises(UserError, match="delta_rule: values"):
        operations.delta_rule(q, q, v, beta)
    three = jnp.ones((1, 9, 3, 4))
    with pytest.raises(UserError, match=r"linear_attention: values .* do not fit queries"):
        operations.linear_attention(three, three, v)


@pytest.mark.usefixtures("optimised")
def test_compiled_for_tpu():
    """Mamba-2's heads: no array has queries or keys for every head, and there is one kernel each way."""
    heads, keys, values, length = 64, 128, 64, 1024
    text = compiles.compiled_of(
        "v5e:1x1", (1, length, heads, keys, values, "bfloat16", "scalar", True), key_heads=1
    ).as_text()
    assert compiles.kernels(text) == [
        "linear_attention_forward_scalar_packed",
        "linear_attention_gradient_scalar_packed",
    ]
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"bf16\[([\d,]+)\]", text))
    assert largest == length * heads * values
