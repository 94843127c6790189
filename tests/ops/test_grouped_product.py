"""A separate matrix product for each group of rows, against a loop over the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import programs, targets
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.ops.grouped_product import BACKENDS, grouped_product
from tests import numerics

# The number of rows, and of rows per group: with empty groups, rows of no group, one row, more than a block.
CASES = {
    "some": (40, (3, 0, 20, 9)),
    "one_row": (1, (0, 1)),
    "none": (8, (0, 0, 0)),
    "all_in_one": (50, (50, 0, 0)),
    "blocks": (300, (17, 133, 0, 149)),
}


def oracle(x, kernels, sizes, dy):
    """y, and the gradients of x and of the kernels."""
    y, dx, d_kernels = np.zeros((len(x), kernels.shape[2])), np.zeros_like(x), np.zeros_like(kernels)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows] = x[rows] @ kernels[group]
        dx[rows] = dy[rows] @ kernels[group].T
        d_kernels[group] = x[rows].T @ dy[rows]
        start += size
    return y, (dx, d_kernels)


@functools.cache
def run(backend):
    @numerics.jit
    def both(x, kernels, sizes, dy):
        y, pullback = jax.vjp(functools.partial(grouped_product, sizes=sizes, backend=backend), x, kernels)
        return y, pullback(dy)

    return both


@pytest.mark.parametrize("name, dtype", numerics.each_dtype(CASES, "some", "blocks"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, name, dtype):
    rows, sizes = CASES[name]
    random = np.random.default_rng(0)
    x, kernels = numerics.normal(random, rows, 5), numerics.normal(random, len(sizes), 5, 7)
    dy = numerics.normal(random, rows, 7)
    found = numerics.run(run(backend), x, kernels, np.asarray(sizes, np.int32), dy, dtype=dtype)
    numerics.assert_close(found, oracle(x, kernels, sizes, dy), numerics.TOLERANCES[dtype])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_kernels_are_summed_in_float32(backend):
    """1,000 equal terms: a bfloat16 sum stops growing at 256. Float32 kernels have float32 gradients."""
    x, kernels = jnp.ones((1000, 1), jnp.bfloat16), jnp.ones((2, 1, 1), jnp.float32)
    y, (_, d_kernels) = run(backend)(x, kernels, jnp.asarray([999, 1], jnp.int32), x)
    assert d_kernels.dtype == jnp.float32 and d_kernels.ravel().tolist() == [999, 1] and y.dtype == jnp.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_group_do_not_matter(backend):
    x = jnp.full((9, 2), jnp.nan).at[:4].set(1.0)
    dy = jnp.full((9, 3), jnp.nan).at[:4].set(1.0)
    sizes = jnp.asarray([1, 3], jnp.int32)
    y, (dx, _) = run(backend)(x, jnp.ones((2, 2, 3)), sizes, dy)
    assert y.tolist() == [[2.0] * 3] * 4 + [[0.0] * 3] * 5
    assert dx.tolist() == [[3.0] * 2] * 4 + [[0.0] * 2] * 5


def test_its_result_can_be_kept():
    """Under a policy that keeps it, the backward pass has its own two products and does not repeat the forward one."""
    policy = jax.checkpoint_policies.save_only_these_names("grouped_product")
    sizes = jnp.asarray([3, 5], jnp.int32)

    def loops(policy):
        def loss(x, kernels):
            product = jax.checkpoint(lambda x, kernels: jnp.sin(grouped_product(x, kernels, sizes)), policy=policy)
            return jnp.sum(product(x, kernels))

        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((8, 2)), jnp.ones((2, 2, 3)))).count(
            "while["
        )

    assert loops(policy) == 3 and loops(jax.checkpoint_policies.nothing_saveable) == 4


@pytest.mark.parametrize(
    ("platform", "rows", "expected"),
    [("cpu", 4, "blocks"), ("tpu", 4, "ragged_dot"), ("gpu", 16, "rows"), ("gpu", 17, "blocks")],
)
def test_few_rows_on_a_gpu_are_no_loop(platform, rows, expected):
    """With two groups."""
    arguments = jnp.ones((rows, 3)), jnp.ones((2, 3, 5)), jnp.array([1, rows - 1])
    with backends.use_platform(platform):
        text = str(jax.make_jaxpr(grouped_product)(*arguments))
    found = {"blocks": " while[" in text, "ragged_dot": "ragged_dot" in text}
    assert [name for name, is_there in found.items() if is_there] == ([] if expected == "rows" else [expected])


def test_the_kernel_has_no_gradients_of_gradients():
    def of_gradient(backend):
        sizes = jnp.asarray([3, 5], jnp.int32)
        loss = lambda x: jnp.sum(grouped_product(x, jnp.ones((2, 2, 3)), sizes, backend=backend) ** 2)  # noqa: E731
        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x)))(jnp.ones((8, 2)))

    with pytest.raises(
        UserError, match=r"kernel \(backend='pallas'\) has no second derivatives; use backend='ragged_dot'"
    ):
        of_gradient("pallas")
    assert of_gradient("ragged_dot").tolist() == [[12.0, 12.0]] * 8


# Per device: M rows for E experts of D by F. In the second, a sum has several parts.
PUBLISHED = {
    "linear_moe_a0b3_2b": (131_072, 16, 1024, 896, "bfloat16"),
    "wide": (32_768, 8, 4096, 1408, "float32"),
    "small": (60, 3, 40, 24, "bfloat16"),
}


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize("target", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_on_tpu_no_row_is_multiplied_for_every_group(name, target):
    """Gradients use the kernel; the rest, which XLA compiles, takes fewer cycles than multiplying all rows by a quarter of
    the matrices."""
    rows, groups, width, inner, dtype = PUBLISHED[name]
    device = targets.find(target).devices[0]

    def gradients(x, kernels, sizes, dy):
        with backends.use_device(device):
            return jax.vjp(lambda x, kernels: grouped_product(x, kernels, sizes), x, kernels)[1](dy)

    shapes = ((rows, width), dtype), ((groups, width, inner), "float32"), ((groups,), "int32"), ((rows, inner), dtype)
    given = [jax.ShapeDtypeStruct(shape, of, sharding=SingleDeviceSharding(device)) for shape, of in shapes]
    text = jax.jit(gradients).lower(*given).compile().as_text()
    assert text.count('grouped_sums/pallas_call"') > 0
    assert programs.cycles(text) < max(groups / 4 * 2 * rows * width * inner / 2**17, 1e5)


@pytest.mark.parametrize(
    "backend, message",
    [
        ("pallas", "the kernel is for TPUs; on GPUs use backend='blocks'"),
        ("loop", "has no backend 'loop'; it has 'auto', 'blocks', 'ragged_dot', 'rows', 'pallas'"),
    ],
)
def test_backends_that_there_are_not_on_gpus(backend, message):
    with backends.use_platform("gpu"), pytest.raises(UserError, match=message):
        grouped_product(jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1, jnp.int32), backend=backend)
