"""Products of activations with parameters, and the precision of their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import PartitionSpec

from jaxlinear.models.layers import Linear
from jaxlinear.ops import backends, dtypes
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.ops.test_precision import products
from tests.shards import make_mesh

EQUATIONS = {
    "ri,io->ro": ((300, 6), (6, 7)),
    "...i,io->...o": ((2, 150, 6), (6, 7)),
    "bthi,hij->bthj": ((2, 150, 3, 6), (3, 6, 5)),
    "btn,nd->btd": ((2, 150, 6), (6, 7)),
}


def inputs(equation):
    """x, a parameter and the gradient of the product; all but the parameter are exact in bfloat16."""
    random = np.random.default_rng(0)
    x, parameter = (numerics.normal(random, *shape) for shape in EQUATIONS[equation])
    x = numerics.wide(numerics.cast(x, "bfloat16"))
    dy = numerics.normal(random, *np.einsum(equation, x, parameter).shape)
    return x, parameter, numerics.wide(numerics.cast(dy, "bfloat16"))


def run(equation, x, parameter, dy, dtype=None, x_dtype="bfloat16", **options):
    """The product of x in ``x_dtype`` and a float32 parameter, and its gradients."""

    def product(x, parameter):
        return dtypes.parameter_product(equation, x, parameter, dtype, **options)

    @numerics.jit
    def both(x, parameter, dy):
        y, pullback = jax.vjp(product, x, parameter)
        return y, *pullback(dy.astype(y.dtype))

    return both(jnp.asarray(x, x_dtype), jnp.asarray(parameter, jnp.float32), jnp.asarray(dy, jnp.float32))


def is_rounded(x):
    """Whether all of these are bfloat16 numbers."""
    return np.array_equal(x, numerics.wide(numerics.cast(x, "bfloat16")))


def terms(equation):
    """The einsum terms of x, the parameter and y."""
    others, y = equation.replace("...", "yz").split("->")
    return *others.split(","), y


# XLA for CPUs lacks float32 results of products of bfloat16 blocks.
@pytest.mark.parametrize(
    "equation, dtype", [(e, d) for e in EQUATIONS for d in (None, "float32") if (e, d) != ("bthi,hij->bthj", "float32")]
)
def test_the_gradient_of_a_parameter_is_a_float32_sum(equation, dtype):
    x, parameter, dy = inputs(equation)
    y, d_x, d_parameter = run(equation, x, parameter, dy, dtype and jnp.dtype(dtype))
    assert (y.dtype, d_x.dtype, d_parameter.dtype) == (dtype or "bfloat16", "bfloat16", "float32")
    rounded, (a, b, c) = numerics.wide(numerics.cast(parameter, "bfloat16")), terms(equation)
    numerics.assert_close(y, np.einsum(equation, x, rounded), 1e-6 if dtype else 2**-8)
    numerics.assert_close(d_x, np.einsum(f"{c},{b}->{a}", dy, rounded), 2**-8)
    numerics.assert_close(d_parameter, np.einsum(f"{a},{c}->{b}", x, dy), 1e-6)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_or_a_sum_rounded_to_the_dtype_of_activations(equation):
    x, parameter, dy = inputs(equation)
    y, d_x, d_parameter = run(equation, x, parameter, dy, wide_gradient=False)
    wide = run(equation, x, parameter, dy)
    assert d_parameter.dtype == "float32"
    assert (y == wide[0]).all() and (d_x == wide[1]).all()
    assert is_rounded(d_parameter)
    assert (d_parameter != wide[2]).mean() > 0.9
    numerics.assert_close(d_parameter, wide[2], 2**-8)


@pytest.mark.parametrize("wide_gradient", [True, False])
def test_in_float32_there_is_nothing_to_round(wide_gradient):
    x, parameter, dy = inputs("...i,io->...o")
    y, d_x, d_parameter = run("...i,io->...o", x, parameter, dy, x_dtype="float32", wide_gradient=wide_gradient)
    for found, expected in (
        (y, x @ parameter),
        (d_x, dy @ parameter.T),
        (d_parameter, np.einsum("bti,bto->io", x, dy)),
    ):
        assert found.dtype == "float32"
        numerics.assert_close(found, expected, 1e-6)


def test_a_mesh_says_in_which_dtype():
    """The gradient is summed over the rows of eight devices."""
    x, parameter, dy = inputs("...i,io->...o")
    x, dy = (y.reshape(4, 75, -1).repeat(2, 0) for y in (x, dy))

    def gradient(choices):
        with sharding.use_mesh(make_mesh({"data": 8}), **choices):

            def product(parameter, x):
                x = sharding.constrain(x, "batch", None, None)
                return operations.parameter_product("...i,io->...o", x, parameter)

            pullback = numerics.jit(lambda x, parameter, dy: jax.vjp(lambda p: product(p, x), parameter)[1](dy)[0])
            arrays = jnp.asarray(x, "bfloat16"), jnp.asarray(parameter, jnp.float32), jnp.asarray(dy, "bfloat16")
            return pullback(*arrays)

    expected = np.einsum("bti,bto->io", x, dy)
    for choices in ({}, {"gradient_dtype": "float32"}):
        numerics.assert_close(gradient(choices), expected, 1e-6)
    rounded = gradient({"gradient_dtype": "bfloat16"})
    assert is_rounded(rounded)
    numerics.assert_close(rounded, expected, 2**-6)


@pytest.mark.parametrize("shape", [(6,), (8, 6), (8, 4, 2, 6)])
def test_a_linear_map_takes_any_shape_on_a_mesh(shape):
    x, layer = jnp.ones(shape, jnp.bfloat16), Linear(6, 7, axes=(None, None), rngs=nnx.Rngs(0))
    expected = layer(x)
    with sharding.use_mesh(make_mesh({"data": 8})):
        found = layer(x)
    assert found.shape == (*shape[:-1], 7)
    assert (found == expected).all()


def test_devices_that_share_a_parameter_sum_its_gradient():
    """Inside a ``shard_map`` that checks what varies over devices."""
    x, parameter, dy = inputs("ri,io->ro")
    x, dy = x[:296], dy[:296]
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def pullback(x, parameter, dy):
        return jax.vjp(functools.partial(dtypes.parameter_product, "ri,io->ro"), x, parameter)[1](dy)

    split = jax.shard_map(
        pullback,
        mesh=make_mesh({"data": 8}),
        in_specs=(rows, whole, rows),
        out_specs=(rows, whole),
        axis_names={"data"},
    )
    d_x, d_parameter = numerics.jit(split)(
        jnp.asarray(x, "bfloat16"), jnp.asarray(parameter, jnp.float32), jnp.asarray(dy, "bfloat16")
    )
    assert (d_x.dtype, d_parameter.dtype) == ("bfloat16", "float32")
    numerics.assert_close(d_parameter, x.T @ dy, 1e-6)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_matrix_units_take_bfloat16_and_give_float32(platform):
    """Of a gradient's three products, this is the parameter's. A CPU has no such product and widens the operands."""

    def total(x, parameter):
        return jnp.sum(dtypes.parameter_product("ri,io->ro", x, parameter).astype(jnp.float32))

    with backends.use_platform(platform):
        shapes = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16), jax.ShapeDtypeStruct((6, 7), jnp.float32)
        found = list(products(jax.make_jaxpr(jax.grad(total, (0, 1)))(*shapes).jaxpr))
    kinds = [[str(x.aval.dtype) for x in (*equation.invars, *equation.outvars)] for equation in found]
    assert sorted(kinds) == [["bfloat16"] * 3, ["bfloat16"] * 3, ["bfloat16", "bfloat16", "float32"]]


@pytest.mark.parametrize("wide_gradient", [True, False])
def test_what_remat_keeps_is_not_computed_again(wide_gradient):
    """Two products forward and two for the gradients of each."""

    def two(x, a, b):
        for parameter in (a, b):
            x = jnp.tanh(dtypes.parameter_product("ri,io->ro", x, parameter, wide_gradient=wide_gradient))
        return jnp.sum(x.astype(jnp.float32))

    shapes = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16), *[jax.ShapeDtypeStruct((6, 6), jnp.float32)] * 2
    for policy, count in ((checkpoint_policies.dots_saveable, 6), (checkpoint_policies.nothing_saveable, 8)):
        gradient = jax.grad(jax.checkpoint(two, policy=policy), (0, 1, 2))
        assert len(list(products(jax.make_jaxpr(gradient)(*shapes).jaxpr))) == count
