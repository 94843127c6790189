"""The kernels of the linear recurrence and of the selective scan: infinities, limits, dtypes and blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import linear_recurrence, selective_scan
from jaxlinear.pallas.scan import blocks
from tests import naive, numerics, oracles
from tests.pallas import kernel_cases

each_platform = pytest.mark.parametrize("target", kernel_cases.PLATFORMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "plain", "packed"])
def test_on_a_simulated_tpu(name, use):
    """With blocks of several registers side by side."""
    use("simulated")
    kernel_cases.check("linear_recurrence", name, "float32")


@pytest.mark.parametrize("reverse", [False, True])
def test_infinities_do_not_cross_documents(reverse, use):
    """On GPU, in either direction: 0 times the last state of the document before would not be a number."""
    use("gpu")
    ids = np.array([[0] * 4 + [1] * 5], np.int32)
    first, second = (slice(4, 9), slice(0, 4)) if reverse else (slice(0, 4), slice(4, 9))  # as the scan goes
    a, x = np.full((1, 9, 3), 0.5, np.float32), np.ones((1, 9, 3), np.float32)
    well, ill = np.ones((1, 3), np.float32), np.full((1, 3), np.inf, np.float32)
    run = numerics.with_gradients(
        lambda x, state: linear_recurrence(a, x, state, segment_ids=ids, reverse=reverse, backend="pallas")
    )
    (h, final), (d_x, d_state) = run((x, well), (x, well))
    (ill_h, ill_final), _ = run((x, ill), (x, well))
    _, (ill_d_x, ill_d_state) = run((x, well), (x, ill))
    assert np.isinf(ill_h[:, first]).all() and np.isinf(ill_d_x[:, second]).all()
    assert np.array_equal(ill_h[:, second], h[:, second]) and np.array_equal(ill_final, final)
    assert np.array_equal(ill_d_x[:, first], d_x[:, first]) and np.array_equal(ill_d_state, d_state)
    assert np.isfinite(h).all() and np.isfinite(d_x).all()


@each_platform
@pytest.mark.parametrize("reverse", [False, True])
def test_limits(small_blocks, target, reverse, use):
    """a = 0 forgets, a = 1 sums (whole numbers, so that float32 is exact), and a = exp(-50) nearly forgets."""
    use(target)
    random = np.random.default_rng(0)
    a = np.broadcast_to(np.array([0.0, 1.0, np.exp(-50.0)]), (1, 50, 3))
    x, d_h = (random.integers(-9, 9, a.shape).astype(float) for _ in range(2))
    state, d_final = np.full((1, 3), 5.0), np.full((1, 3), -2.0)
    outputs = oracles.linear_recurrence(a, x, state, reverse=reverse)
    kernel = kernel_cases.kernel("linear_recurrence", reverse=reverse)
    found, (d_a, d_x, d_state) = numerics.run(kernel, (a, x, state), (d_h, d_final), dtype="float32")
    numerics.assert_close(*jax.tree.map(lambda y: y[..., :2], (found, outputs)), 0)
    numerics.assert_close(found, outputs, 1e-6)
    # The gradient of x is the same recurrence over d_h in the other direction, with d_final in its first step.
    d_h[:, 0 if reverse else -1] += d_final
    expected, last = oracles.linear_recurrence(a, d_h, reverse=not reverse)
    numerics.assert_close((d_x, d_state), (expected, a[:, 0] * last), 1e-6)
    before = [outputs[0][:, 1:], state[:, None]] if reverse else [state[:, None], outputs[0][:, :-1]]
    numerics.assert_close(d_a, expected * np.concatenate(before, axis=1), 1e-6)


@pytest.mark.parametrize("width", [1, 100, 128, 300, 640, 2560, 8192])
@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "another"])
def test_blocks(kind, width):
    """They take at most 12 MiB of VMEM, counting a backward pass's arrays twice, and waste at most a tile each."""
    for parts in (1, 2):
        block = blocks.tpu(kind, 100_000, width, parts)
        assert block.time % 128 == block.rows % 16 == block.time % block.rows == 0
        assert block.width == width or block.width % 128 == 0
        count = -(-width // block.width)
        assert (count - 1) * block.width < width and count * block.width - width < 128 * count
        assert 2 * 5 * parts * block.time * block.width * 4 <= 12 * 2**20


def test_a_complex_constant_with_a_real_input(small_blocks):
    """With trailing axes, an a with fewer axes, documents, and no initial state."""
    random = np.random.default_rng(1)
    a, x = numerics.uniform(random, 3, high=0.9) * np.exp(1j), numerics.normal(random, 2, 20, 2, 3)
    ids = np.array([[0] * 7 + [1] * 13, [3] * 20], np.int32)
    cotangents = tuple(numerics.normal(random, *s, complex_=True) for s in ((2, 20, 2, 3), (2, 2, 3)))
    expected, found = (
        numerics.run(kernel, (a, x), cotangents, dtype="float64")
        for backend in ("recurrent", "pallas")
        for kernel in [kernel_cases.kernel("linear_recurrence", segment_ids=ids, backend=backend)]
    )
    numerics.assert_close(found, numerics.wide(expected), 1e-10)
    assert [y.dtype for y in found[0]] == [y.dtype for y in expected[0]]


@each_platform
def test_time_steps_wider_than_what_is_written(small_blocks, target, use):
    """As in models: each gradient has the dtype of its input."""
    use(target)
    inputs, options, cotangents, expected = kernel_cases.case("selective_scan", "packed")

    def kernel(x, dt, A, *others):
        dt, A = dt.astype(jnp.float32), A.astype(jnp.float32)
        return selective_scan(x, dt, A, *others, **options, backend="pallas")

    found = numerics.run(numerics.with_gradients(kernel), inputs, cotangents, dtype="bfloat16")
    numerics.assert_close(found, expected, numerics.TOLERANCES["bfloat16"])


@each_platform
def test_limits_of_the_selective_scan(small_blocks, target, use):
    """Channels with time steps of 0, which keep the state, of 1e4, which forget it, and of 1; in one document, and one per
    token."""
    use(target)
    random = np.random.default_rng(0)
    dt = np.broadcast_to(np.array([0.0, 1e4, 1.0]), (2, 20, 3)).copy()
    x, (B, C) = numerics.normal(random, 2, 20, 3), numerics.normal(random, 2, 2, 20, 2)
    inputs = x, dt, -np.ones((3, 2)), B, C, numerics.normal(random, 2, 3, 2)
    ids = np.stack([np.zeros(20), np.arange(20)]).astype(np.int32)
    cotangents = numerics.cotangents_like(random, (x, inputs[-1]))
    loop = numerics.with_gradients(functools.partial(naive.selective_scan, ids=ids))
    expected = numerics.run(loop, inputs, cotangents, dtype="float64")
    found = numerics.run(kernel_cases.kernel("selective_scan", segment_ids=ids), inputs, cotangents, dtype="float32")
    for row in range(2):
        of_row = lambda tree, row=row: jax.tree.map(lambda y: y[row] if y.shape != (3, 2) else y, tree)  # noqa: E731
        numerics.assert_close(of_row(found), of_row(expected), 1e-5)
