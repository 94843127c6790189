"""Products of float32: by default a TPU computes them in bfloat16 and a GPU in TF32. A CPU's results do not show this, so
it is read from the traced programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend import core

from jaxlinear import ops
from jaxlinear.models.mixture_of_experts import _losses
from jaxlinear.ops import backends
from jaxlinear.ops.grouped_product import grouped_product

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
TIME, HEADS, WIDTH = 32, 2, 16
DECAYS = {"none": None, "scalar": (1, TIME, HEADS), "channel": (1, TIME, HEADS, WIDTH)}
TPU, GPU = ("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100 80GB HBM3")


def products(jaxpr):
    """The product equations of a jaxpr and of the programs nested in it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
            if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
                yield from products(getattr(value, "jaxpr", value))


def cut(run, *inputs):
    """The products of a function and its gradients that may take float32 inputs and round them; and how many products."""

    def total(*inputs):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(run(*inputs)))

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    found = list(products(jax.make_jaxpr(jax.value_and_grad(total, range(len(shapes))))(*shapes).jaxpr))
    wide = [x for x in found if any(operand.aval.dtype == jnp.float32 for operand in x.invars[:2])]
    return [x for x in wide if set(x.params["precision"] or ()) != {lax.Precision.HIGHEST}], len(found)


def arrays(count, dtype):
    return [((1, TIME, HEADS, WIDTH), dtype)] * count


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "backend, dtype, platform",
    [
        *((backend, dtype, TPU) for backend in ("recurrent", "chunked", "pallas") for dtype in ("float32", "bfloat16")),
        ("pallas", "bfloat16", GPU),
    ],
)
@pytest.mark.parametrize("operation", ["linear_attention", "delta_rule"])
def test_of_recurrences(operation, backend, dtype, platform, decay):
    beta = [((1, TIME, HEADS), "float32")] if operation == "delta_rule" else []
    decays = [(DECAYS[decay], "float32")] if DECAYS[decay] else []
    state = ((1, HEADS, WIDTH, WIDTH), "float32")

    def run(*inputs, **options):
        *inputs, state = inputs
        inputs = inputs if decays else (*inputs, None)
        return getattr(ops, operation)(*inputs, state, backend=backend, **options)

    kernels_of_their_own = [{"negative_eigenvalues": True}] if (operation, backend) == ("delta_rule", "pallas") else []
    with backends.use_platform(*platform):
        for options in ({}, *kernels_of_their_own):
            found, count = cut(functools.partial(run, **options), *arrays(3, dtype), *beta, *decays, state)
            assert not found and count >= 3


@pytest.mark.parametrize("backend", ["recurrent", "chunked", "pallas"])
@pytest.mark.parametrize("operation", ["sliding_window_attention", "causal_attention"])
def test_of_attention(operation, backend):
    window = {"window": 8} if operation == "sliding_window_attention" else {}
    run = functools.partial(getattr(ops, operation), backend=backend, **window)
    with backends.use_platform(*TPU):
        found, count = cut(run, *arrays(3, "float32"))
    assert not found and count >= 7


KERNELS = {
    "linear_attention": (functools.partial(ops.linear_attention, backend="pallas"), []),
    "delta_rule": (functools.partial(ops.delta_rule, backend="pallas"), [((1, TIME, HEADS), "float32")]),
    "causal_attention": (functools.partial(ops.causal_attention, backend="pallas"), []),
}


def grouped(q, k, v):
    """The experts' products."""
    rows = q.reshape(-1, WIDTH)
    return grouped_product(rows, k.reshape(-1, WIDTH, WIDTH), jnp.ones(len(rows) // WIDTH, jnp.int32), backend="pallas")


def of_gates(operation):
    def run(q, k, v):
        kernel, vector = k.reshape(-1, WIDTH, WIDTH)[:HEADS], v.reshape(-1)[: HEADS * WIDTH]
        given = q.reshape(1, TIME, -1), kernel, vector, kernel, vector, vector, jnp.ones((1, TIME), bool)
        return operation(*given, backend="pallas")

    return run


OTHERS = {"grouped_product": grouped, "rg_lru_gates": of_gates(ops.rg_lru_gates), "rg_lru": of_gates(ops.rg_lru)}


@pytest.mark.parametrize(
    "operation, platform",
    [*((name, TPU) for name in (*KERNELS, *OTHERS)), *((name, GPU) for name in KERNELS)],
)
def test_kernels_of_bfloat16_under_a_default_of_more(operation, platform):
    """Mosaic multiplies bfloat16 only in bfloat16's precision; asking for more would end in a compiler error."""
    run, beta = KERNELS.get(operation, (OTHERS.get(operation), []))
    with backends.use_platform(*platform), jax.default_matmul_precision("highest"):
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (*arrays(3, "bfloat16"), *beta)]
        jaxpr = jax.make_jaxpr(lambda *inputs: jax.vjp(run, *inputs)[1](run(*inputs)))(*shapes).jaxpr
    narrow = [x for x in products(jaxpr) if {operand.aval.dtype.name for operand in x.invars[:2]} == {"bfloat16"}]
    asked = [x.params["precision"] for x in narrow]
    assert len(narrow) >= 3 and {*asked} <= {lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2}


def test_of_the_losses_of_a_router():
    def run(logits):
        _, chosen = lax.top_k(logits, 2)
        return _losses(logits, jax.nn.logsumexp(logits, axis=-1), chosen, None)

    found, count = cut(run, ((2, TIME, 4), "float32"))
    assert not found and count >= 2


def test_products_that_may_be_cut_are_found():
    """In nested programs, too; products of bfloat16 have no precision to lose."""

    def run(x, y):
        return jax.lax.scan(lambda c, _: (jax.jit(lambda c: c @ x)(c), None), y, length=2)[0]

    square = ((4, 4), "float32")
    assert len(cut(run, square, square)[0]) == cut(run, square, square)[1] >= 3
    with jax.default_matmul_precision("highest"):
        assert not cut(run, square, square)[0]
    assert not cut(run, *[((4, 4), "bfloat16")] * 2)[0]
