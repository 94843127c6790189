"""GateLoop: its initial values, and transitions with a known outcome. Its outputs: test_mixers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.gateloop import GateLoop
from tests import numerics, oracles, small


def test_the_numbers_at_the_start():
    """On tokens of variance 1: magnitudes around 1/2, phases around 0, and channels of variance 1 in each group."""
    layer = GateLoop(small.config(width=64, recurrent_width=256, recurrent_heads=4, num_layers=8), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 100, 64)), jnp.float32)
    a = layer._transition(x)
    assert a.dtype == jnp.complex64 and np.mean(np.abs(a)) == pytest.approx(0.5, abs=0.02)
    assert np.std(np.angle(a)) == pytest.approx(1, abs=0.05)
    y, state = numerics.jit(lambda x: layer(x))(x)
    assert state["h"].shape == (2, 256) and state["h"].dtype == jnp.complex64
    # silu of a normal number has a mean square of 0.356; the last kernel a variance of 2 / (layers x fan-in).
    assert np.var(y) == pytest.approx(0.356 * 2 / 8, rel=0.2)


@pytest.mark.parametrize("magnitude, phase", [(40.0, 0.0), (40.0, np.pi), (-200.0, 0.3), (0.0, np.pi / 2)])
def test_a_transition_that_does_not_depend_on_the_data(magnitude, phase):
    """1 sums, -1 sums with alternating signs, 0 forgets, i / 2 takes every other earlier token with alternating signs."""
    config = small.config(recurrent_heads=3)
    graph, parameters = small.module(lambda rngs: GateLoop(config, rngs=rngs))
    for name, bias in (("magnitude", magnitude), ("phase", phase)):
        parameters |= {name: {"kernel": np.zeros((16, 24))}, f"{name}_bias": np.full(24, bias)}
    x = np.random.default_rng(1).standard_normal((1, 6, 16))
    q, k, v, gate = (oracles.linear(parameters[name], x) for name in ("query", "key", "value", "gate"))
    weights = {
        (40.0, 0.0): [1, 1, 1, 1, 1, 1],
        (40.0, np.pi): [1, -1, 1, -1, 1, -1],
        (-200.0, 0.3): [1, 0, 0, 0, 0, 0],
        (0.0, np.pi / 2): [1, 0, -1 / 4, 0, 1 / 16, 0],
    }[magnitude, phase]
    o = q * np.stack([sum(weights[t - s] * (k * v)[:, s] for s in range(t + 1)) for t in range(6)], axis=1)
    o = oracles.rms_norm(parameters["norm"], o.reshape(1, 6, 3, 8)).reshape(o.shape)
    expected = oracles.linear(parameters["out"], gate * oracles.sigmoid(gate) * o)
    with jax.enable_x64(True):
        y, _ = nnx.merge(graph, numerics.cast(parameters, "float64"))(jnp.asarray(x))
    numerics.assert_close(y, expected, 1e-10)


def test_the_transition_is_not_rounded_to_bfloat16():
    """Nor are the products that it comes from: a phase accumulates over time."""
    graph, parameters = small.module(lambda rngs: GateLoop(small.config(), rngs=rngs))
    parameters = jax.tree.map_with_path(
        lambda path, x: numerics.representable(x) if path[-1].key == "kernel" else x, parameters
    )
    x = numerics.normal(np.random.default_rng(2), 2, 9, 16)
    run = lambda parameters, x: nnx.merge(graph, parameters)._transition(x)  # noqa: E731
    expected = numerics.run(run, parameters, x, dtype="float64")
    found = run(numerics.cast(parameters, "float32"), numerics.cast(x, "bfloat16"))
    assert found.dtype == jnp.complex64
    numerics.assert_close(found, numerics.wide(expected), 3e-6)
