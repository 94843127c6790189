"""Retention: its parameters, their initial values, its decays and its norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.mixers.retention import Retention
from jaxlinear.parallel import operations
from tests import numerics, small


def test_the_parameters():
    """2 heads: K = D / H, V = 2 D / H. The norm has no parameters."""
    _, parameters = small.module(lambda rngs: Retention(small.config(), rngs=rngs))
    assert jax.tree.map(np.shape, parameters) == {
        "query": {"kernel": (16, 16)},
        "key": {"kernel": (16, 16)},
        "value": {"kernel": (16, 32)},
        "gate": {"kernel": (16, 32)},
        "out": {"kernel": (32, 16)},
    }
    _, parameters = small.module(lambda rngs: Retention(small.config(head_norm="rms"), rngs=rngs))
    assert parameters["norm"]["scale"].shape == (16,)


def test_the_state():
    mixer = Retention(small.config(recurrent_heads=3, key_width=6, value_width=5), rngs=nnx.Rngs(0))
    state = mixer.init_state(7)
    assert jax.tree.map(lambda x: x.shape, state) == {"memory": (7, 3, 6, 5), "position": (7,)}
    _, state = numerics.jit(mixer)(jnp.ones((7, 4, 16)), state=state)
    assert state["position"].tolist() == [4] * 7


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"^retention: 3 heads do not divide 16 channels"):
        Retention.widths(small.config(recurrent_heads=3))


def test_the_parameters_at_the_start():
    mixer = Retention(small.config(width=256, num_heads=4), rngs=nnx.Rngs(0))
    for name, outputs in {"query": 256, "key": 256, "value": 512, "gate": 512}.items():
        deviation = (2**-5 * 2 / (256 + outputs)) ** 0.5
        kernel = getattr(mixer, name).kernel[...]
        assert np.std(kernel) == pytest.approx(deviation, rel=0.05), name
        assert np.abs(kernel).max() == pytest.approx(3**0.5 * deviation, rel=0.02), name  # uniform
    assert np.std(mixer.out.kernel[...]) == pytest.approx((2 / (512 + 256)) ** 0.5, rel=0.05)


def test_the_decays(monkeypatch):
    """1 - 1/32, 1 - 1/64, ...; the last of 16 heads is still distinct from 1."""
    decays = []

    def attend(q, k, v, log_decay, *arguments, **options):
        decays.append(log_decay)
        return v, None

    monkeypatch.setattr(operations, "linear_attention", attend)
    mixer = Retention(small.config(dtype="bfloat16", recurrent_heads=16), rngs=nnx.Rngs(0))
    mixer(jnp.ones((1, 1, 16), jnp.bfloat16))
    expected = [1 / 2 ** (5 + h) for h in range(16)]
    numerics.assert_close(-jnp.expm1(decays[0]), np.array(expected), 1e-6)
    assert -np.expm1(np.float64(decays[0][-1])) == pytest.approx(2**-20, rel=1e-5)


def test_what_is_seen_depends_on_the_distance_alone():
    """The same two tokens, far along a row, after tokens of another document."""
    config = small.config(rotary_fraction=1.0)
    graph, parameters = small.module(lambda rngs: Retention(config, rngs=rngs))
    mixer = nnx.merge(graph, numerics.cast(parameters, "float32"))
    x = numerics.cast(numerics.normal(np.random.default_rng(0), 1, 2, 16), "float32")
    row = jnp.concatenate([jnp.zeros((1, 700, 16)), x], axis=1)
    ids = np.array([[0] * 700 + [1] * 2], np.int32)
    numerics.assert_close(numerics.jit(mixer)(row, segment_ids=ids)[0][:, -2:], mixer(x)[0], 1e-4)
