"""What linear attention and the delta rule both promise, whatever runs them, for the dtypes of training: q, k and v in
bfloat16 with log decays and states in float32."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.ops import backends
from jaxlinear.pallas.parts.target import Target
from tests import numerics

B, T, H, K = 1, 40, 2, 16
DECAYS = {"constant": (H, 1), "scalar": (B, T, H, 1), "channel": (B, T, H, K)}
WAYS = ("recurrent", "chunked", "tpu", "gpu")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "operation, decay", [("linear_attention", "constant"), ("linear_attention", "channel"), ("delta_rule", "scalar")]
)
def test_decays_and_states_are_not_rounded_to_the_inputs(monkeypatch, operation, decay, way):
    """If nothing is written, a state shrinks by exp of the sum of the log decays, to float32 accuracy; with these rounded
    to bfloat16 it would be off by up to a hundredth."""
    if way in ("tpu", "gpu"):
        monkeypatch.setattr(backends, "target", lambda: Target(way, "none", True))
    random = np.random.default_rng(0)
    log_decay = np.float32(-random.uniform(0.01, 0.1, DECAYS[decay]))
    state = np.float32(random.standard_normal((B, H, K, K)))
    x, none = jnp.asarray(random.standard_normal((B, T, H, K)), jnp.bfloat16), jnp.zeros((B, T, H, K), jnp.bfloat16)
    beta = (jnp.full((B, T, H), 0.5),) if operation == "delta_rule" else ()
    backend = "pallas" if way in ("tpu", "gpu") else way
    run = functools.partial(getattr(ops, operation), x, none, x, *beta, backend=backend)
    given = jnp.asarray(log_decay if decay == "channel" else log_decay[..., 0])
    o, final = numerics.jit(lambda *arrays: run(*arrays))(given, jnp.asarray(state))
    total = np.sum(np.broadcast_to(log_decay, (B, T, H, log_decay.shape[-1])), axis=1, dtype=np.float64)
    assert o.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    numerics.assert_close(final, np.exp(total)[..., None] * state, 3e-6)
