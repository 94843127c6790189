"""S5: its initial spectrum, with which it is the paper's real layer, its steps, and its two directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.mixers.s5 import S5, _hippo, bilinear, zero_order_hold
from tests import numerics, oracles, small
from tests.mixer_oracles import diagonal

STEP = 0.03


def normal_part(size):
    """HiPPO-LegS's normal part: the matrix of Gu et al. 2020 (arXiv:2008.07669) plus a low-rank term (arXiv:2206.11893)."""
    hippo = np.zeros((size, size))
    for n in range(size):
        for k in range(n + 1):
            hippo[n, k] = -(n + 1) if n == k else -(((2 * n + 1) * (2 * k + 1)) ** 0.5)
    low_rank = np.sqrt(np.arange(size) + 0.5)
    return hippo + np.outer(low_rank, low_rank)


@pytest.mark.parametrize("size", [2, 12, 64])
def test_the_spectrum_is_that_of_hippo(size):
    eigenvalues, vectors = _hippo(size)
    numerics.assert_close(eigenvalues.real, np.full(size // 2, -0.5), 1e-12)
    assert (eigenvalues.imag > 0).all()
    numerics.assert_close(normal_part(size) @ vectors, vectors * eigenvalues, 1e-11)
    numerics.assert_close(vectors.conj().T @ vectors, np.eye(size // 2), 1e-12)


@pytest.mark.parametrize("method", ["zero_order_hold", "bilinear"])
def test_at_the_start_it_is_the_real_layer(method):
    """h' = A h + B' x with A block-diagonal and everything real, in steps of one Delta."""
    config = small.config(discretization=method)
    parameters = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(S5(config, rngs=nnx.Rngs(0)))))
    parameters["log_step"] = np.full(12, np.log(STEP))
    vectors = scipy.linalg.block_diag(*[_hippo(12)[1]] * 2)
    b, c = (kernel[0] + 1j * kernel[1] for kernel in (parameters["input_kernel"], parameters["output_kernel"]))
    b, c = 2 * (vectors @ b.T).real, 2 * (c.T @ vectors.conj().T).real
    a, identity = scipy.linalg.block_diag(*[normal_part(12)] * 2), np.eye(24)
    if method == "bilinear":
        inverse = np.linalg.inv(identity - STEP / 2 * a)
        step, b = inverse @ (identity + STEP / 2 * a), STEP * inverse @ b
    else:
        step = scipy.linalg.expm(STEP * a)
        b = np.linalg.inv(a) @ (step - identity) @ b
    x = np.random.default_rng(0).standard_normal((1, 50, 16))
    h, z = np.zeros(24), np.zeros((50, 16))
    for t in range(50):
        h = step @ h + b @ x[0, t]
        z[t] = c @ h
    numerics.assert_close(diagonal.s5_states(parameters, x, None, method)[0], z, 1e-6)


def test_the_numbers_at_the_start():
    """J blocks with the same spectrum; Delta is log-uniform; B and C have the variances of their real originals."""
    layer = S5(small.config(width=64, recurrent_width=2048, recurrent_heads=64), rngs=nnx.Rngs(0))
    numerics.assert_close(-np.exp(layer.log_rate[...]), np.full(1024, -0.5), 1e-6)
    numerics.assert_close(layer.frequency[...], np.tile(_hippo(32)[0].imag, 64), 1e-6)
    step = np.asarray(layer.log_step[...], np.float64)
    assert np.log(0.001) - 1e-5 <= step.min() and step.max() <= np.log(0.1) + 1e-5
    tenths = np.linspace(0.1, 0.9, 9)
    place = (np.quantile(step, tenths) - np.log(0.001)) / np.log(100)
    numerics.assert_close(place, tenths, 0.05)
    for kernel, variance in ((layer.input_kernel, 1 / 64), (layer.output_kernel, 1 / 2048)):
        assert np.mean(np.sum(np.square(kernel[...]), axis=0)) == pytest.approx(variance, rel=0.02)


def test_white_noise_gives_outputs_of_variance_one():
    """Almost all of it comes through the skip: a state of step Delta has variance Delta."""
    layer = S5(small.config(width=64, recurrent_width=128, recurrent_heads=4), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1000, 64)), jnp.float32)
    run = numerics.jit(lambda x: layer.recur(x, None, None))
    z, h = run(x)
    assert np.var(z) == pytest.approx(np.mean(np.square(layer.skip[...])) + 0.0215, rel=0.1)
    assert np.mean(np.abs(h) ** 2) == pytest.approx(0.0215, rel=0.6)


@pytest.mark.parametrize("discretize", [zero_order_hold, bilinear])
def test_steps_of_every_size(discretize):
    """In float32, where exp(x) - 1 would lose a small step; and never unstable."""
    eigenvalues = np.array([-0.5 + 3j, -1e-3 + 1e-3j, -0.5 + 600j, -40 + 1j])
    for step in (1e-6, 1e-3, 0.1):
        expected = numerics.run(discretize, eigenvalues, np.full(4, step), dtype="float64")
        found = numerics.run(discretize, eigenvalues, np.full(4, step), dtype="float32")
        for got, want in zip(found, numerics.wide(expected), strict=True):
            assert np.max(np.abs(got - want) / np.abs(want)) < 1e-5
        assert np.max(np.abs(found[0])) <= 1


IDS = np.array([[1] * 9, [1, 1, 2, 2, 2, 2, 1, 1, 1]], np.int32)


@functools.cache
def both_ways():
    config = small.config(dtype="float64")
    graph, parameters = small.module(lambda rngs: S5(config, bidirectional=True, rngs=rngs))
    return parameters, numerics.jit(lambda parameters, x, ids: nnx.merge(graph, parameters)(x, segment_ids=ids))


def test_both_directions_are_those_of_the_oracle():
    parameters, run = both_ways()
    x = numerics.normal(np.random.default_rng(0), 2, 9, 16)
    back = parameters | {"output_kernel": parameters["reverse_output_kernel"]}
    z = diagonal.s5_states(parameters, x, IDS, "zero_order_hold") + parameters["skip"] * x
    z = z + diagonal.s5_states(back, x[:, ::-1], IDS[:, ::-1], "zero_order_hold")[:, ::-1]
    z = oracles.gelu(z)
    y, state = numerics.run(run, parameters, x, IDS, dtype="float64")
    numerics.assert_close(y, z * oracles.sigmoid(oracles.linear(parameters["gate"], z)), 1e-10)
    assert state is None


def test_both_directions_see_the_whole_document_and_no_other():
    parameters, run = both_ways()
    x = numerics.normal(np.random.default_rng(0), 2, 9, 16)
    moved = x.copy()
    moved[1, 4] += 1
    before, after = (numerics.run(run, parameters, y, IDS, dtype="float64")[0] for y in (x, moved))
    assert np.flatnonzero(np.any(before != after, axis=-1)).tolist() == [9 + 2, 9 + 3, 9 + 4, 9 + 5]


def test_a_state_in_both_directions_is_refused():
    layer = S5(small.config(), bidirectional=True, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="bidirectional layer has no state"):
        layer.init_state(1)
    with pytest.raises(UserError, match="bidirectional layer cannot continue from a state"):
        layer(jnp.zeros((1, 2, 16)), state={"h": jnp.zeros((1, 12), jnp.complex64)})
