"""Queries and keys that all heads share, as in Mamba-2: the results are as if each head had its own copy, but kernels read
only one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.costs import targets
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, linear_attention, matrix_states
from jaxlinear.ops.linear_attention.op import LINEAR_ATTENTION, choose
from jaxlinear.pallas.linear_attention import blocks
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.pallas import kernel_cases
from tests.pallas import test_every_kernel_compiles as compiles
from tests.pallas.kernel_cases import ids_of
from tests.shards import FOUR, IDS, TWO, T, make_mesh

as_the_recurrence = functools.partial(kernel_cases.assert_as_the_recurrence, "linear_attention")
each_platform = pytest.mark.parametrize("platform", kernel_cases.PLATFORMS)


def draw(decay, length, heads, keys, values, batch=1):
    random = np.random.default_rng(0)
    q, k, *rest = kernel_cases.draw("linear_attention", random, decay, length, heads, keys, values, batch)
    return q[:, :, :1], k[:, :, :1], *rest


@pytest.mark.parametrize(
    "backend, decay, heads", [("recurrent", "scalar", 3), ("chunked", "constant", 3), ("chunked", "channel", 2)]
)
def test_as_if_each_head_had_its_own(backend, decay, heads):
    def of_every_head(q, k, v, *rest):
        q, k = (jnp.broadcast_to(x, (*x.shape[:2], heads, x.shape[3])) for x in (q, k))
        return linear_attention(q, k, v, *rest, segment_ids=ids, backend=backend)

    ids = ids_of(5, 40, 25)
    as_the_recurrence(draw(decay, 70, heads, 6, 64), run=of_every_head, segment_ids=ids)
    as_the_recurrence(draw(decay, 70, heads, 6, 64), segment_ids=ids, backend=backend)


# In blocks of 2 heads, of 5, or of all three.
@pytest.mark.parametrize("decay, heads", [("none", 3), ("constant", 10), ("scalar", 10), ("channel", 2)])
def test_on_tpu(monkeypatch, decay, heads):
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", (blocks.Block(64, 32, 1),) * 2)
    as_the_recurrence(draw(decay, 70, heads, 6, 64), segment_ids=ids_of(5, 40, 25))


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize(
    "decay, heads, keys, values",
    # Gradients of q and k in one part; in two, of five heads and of five and four; by several tiles, the last not whole.
    [("none", 3, 6, 5), ("constant", 10, 6, 5), ("scalar", 9, 6, 5), ("scalar", 3, 40, 50), ("channel", 2, 6, 5)],
)
@pytest.mark.parametrize("packed", [True, False])
def test_on_gpu(monkeypatch, decay, heads, keys, values, packed, use):
    use("gpu")
    monkeypatch.setattr(blocks, "gpu", lambda *_: blocks.GPUBlock(16, 16, 16, 32, 32, 16, 32))
    ids = np.repeat([[0, 1, 2], [0, 0, 1]], [5, 27, 8], axis=1).astype(np.int32) if packed else None
    as_the_recurrence(draw(decay, 40, heads, keys, values, batch=2), segment_ids=ids)


@each_platform
@pytest.mark.parametrize("sizes", [{"data": 8}, FOUR, TWO], ids=str)
def test_no_array_is_of_every_head(platform, sizes, use):
    """Neither kernel inputs, nor what is kept for the backward pass, nor gradients, which are per group of heads."""
    use(platform)
    heads, keys, values, length = 16, 32, 48, 128
    inputs = numerics.cast(draw("scalar", length, heads, keys, values), "float32")

    def gradient(*inputs):
        outputs, pullback = jax.vjp(functools.partial(operations.linear_attention, backend="pallas"), *inputs)
        return pullback(outputs)

    with sharding.use_mesh(make_mesh(sizes)):
        text = str(jax.make_jaxpr(gradient)(*inputs))
    mesh = {"sequence": 1, "tensor": 1} | sizes
    own_length, own_heads = length // mesh["sequence"], heads // mesh["tensor"]
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    in_time = {shape[1:] for shape in shapes if shape[:2] in ((1, length), (1, own_length))}
    assert (own_length, 1, keys) in in_time and (own_length, own_heads, values) in in_time
    of_every_head = {n * keys * t for n in (heads, own_heads) for t in (length, own_length)}
    assert not of_every_head & {math.prod(shape) for shape in in_time}


def test_on_a_simulated_tpu(use):
    """Reads beyond an array or of unwritten memory give NaN, also for a head after the last."""
    use("simulated")
    as_the_recurrence(draw("scalar", 40, 3, 6, 64), "float32")


@each_platform
def test_the_gradient_of_the_state_alone(platform, use):
    use(platform)
    *inputs, state = draw("scalar", 20, 10, 6, 64)
    d_o = np.random.default_rng(1).standard_normal(inputs[2].shape)
    with jax.enable_x64(True):
        of_state = [
            jax.grad(lambda state, how=how: jnp.sum(linear_attention(*inputs, state, backend=how)[0] * d_o))(state)
            for how in ("pallas", "recurrent")
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


@pytest.mark.slow(but_nth=5)
@each_platform
@pytest.mark.parametrize("sizes, backend, decay, heads", MESHES, ids=str)
def test_on_a_mesh(short_chunks, sizes, backend, decay, heads, platform, use):
    """Heads are spread, and their gradients of queries and keys summed; rows and time are spread, too."""
    use(platform)
    inputs = draw(decay, T, heads, 6, 8, batch=8 if sizes == {"fsdp": 8} else 4)
    ids = np.concatenate([IDS, IDS[::-1]])[: len(inputs[0])]
    run = functools.partial(operations.linear_attention, segment_ids=ids, backend=backend)
    with sharding.use_mesh(make_mesh(sizes)):
        as_the_recurrence(inputs, run=run, segment_ids=ids)


def test_the_gradient_of_a_shared_key_is_summed_over_heads_in_float32():
    """In bfloat16 a sum of ones stops growing at 256."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    y, pullback = jax.vjp(lambda x: matrix_states.for_every_head(x, 1024), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pullback(jnp.ones_like(y))[0], 1024)
    equations = jax.make_jaxpr(pullback)(jnp.ones_like(y)).eqns
    sums = [eqn.invars[0].aval for eqn in equations if "sum" in eqn.primitive.name]
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


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_compiled_for_tpu():
    """Mamba-2's heads: no array has queries or keys for every head, and there is one kernel each way."""
    heads, keys, values, length = 64, 128, 64, 1024
    kernel, case = compiles.TestLinearAttention(), (1, length, heads, keys, values, "bfloat16", "scalar", True, 1)
    text = compiles.compiled(targets.find("v5e:1x1").devices[0], *kernel.program(*case)).as_text()
    assert kernel.kernels(text) == kernel.names(*case)
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"bf16\[([\d,]+)\]", text))
    assert largest == length * heads * values
