"""DeltaNet: its parameters, their initial values, and its keys of unit length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.mixers.delta_net import DeltaInputs, DeltaNet
from tests import numerics, small


def test_the_parameters():
    """2 heads of 8: K = V = D / H."""
    _, parameters = small.module(lambda rngs: DeltaNet(small.config(), rngs=rngs))
    parts = ("query", "key", "value")
    assert jax.tree.map(np.shape, parameters) == {
        "inputs": {
            **{name: {"kernel": (16, 16)} for name in parts},
            **{f"{name}_convolution": {"convolution_kernel": (4, 16)} for name in parts},
            "beta": {"kernel": (16, 2)},
        },
        "norm": {"scale": (8,)},
        "out": {"kernel": (16, 16)},
    }


def test_the_gate():
    """It has the values' width, and the other parameters are the same without it."""
    config = small.config(recurrent_heads=3, key_width=5, value_width=4, output_gate="silu")
    gated = small.module(lambda rngs: DeltaNet(config, rngs=rngs))[1]
    assert gated.pop("gate")["kernel"].shape == (16, 12)
    for gate in ("none", "auto"):
        plain = small.module(lambda rngs: DeltaNet(dataclasses.replace(config, output_gate=gate), rngs=rngs))[1]  # noqa: B023
        assert jax.tree.map(np.shape, plain) == jax.tree.map(np.shape, gated)


def test_the_widths_that_are_given():
    config = small.config(recurrent_heads=3, key_width=5, value_width=4)
    mixer = nnx.eval_shape(lambda: DeltaNet(config, rngs=nnx.Rngs(0)))
    assert jax.tree.map(lambda x: x.shape, mixer.init_state(7)) == {
        "memory": (7, 3, 5, 4),
        "query": (7, 3, 15),
        "key": (7, 3, 15),
        "value": (7, 3, 12),
    }


@pytest.mark.parametrize("given", [{}, {"key_width": 4}, {"value_width": 4}], ids=str)
def test_heads_that_do_not_divide_are_refused(given):
    with pytest.raises(UserError, match=r"^delta_net: 3 heads do not divide 16 channels"):
        DeltaNet(small.config(recurrent_heads=3, **given), rngs=nnx.Rngs(0))


def test_the_parameters_at_the_start():
    mixer = DeltaNet(small.config(width=256, num_heads=4, num_layers=8), rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "beta"):
        assert np.std(getattr(mixer.inputs, name).kernel[...]) == pytest.approx(256**-0.5, rel=0.05), name
    assert np.std(mixer.out.kernel[...]) == pytest.approx((2 / 8 / 256) ** 0.5, rel=0.05)
    assert not mixer.norm.scale[...].any()


@pytest.mark.parametrize("gate, size", [("none", 1), ("silu", 0.6)])
def test_the_outputs_at_the_start(gate, size):
    """The gate is the one of gated_delta_net."""
    mixer = DeltaNet(small.config(width=64, num_heads=4, num_layers=8, output_gate=gate), rngs=nnx.Rngs(0))
    y, _ = numerics.jit(mixer)(jax.random.normal(jax.random.key(1), (4, 32, 64)))
    assert float(jnp.std(y)) == pytest.approx(size * (2 / 8) ** 0.5, rel=0.1)


def test_no_eigenvalue_lies_beyond_minus_one():
    """Keys are rounded to bfloat16, to lengths above and below 1, and beta is 2 to float32 accuracy."""
    config = small.config(dtype="bfloat16", negative_eigenvalues=True, householders=2)
    graph, parameters = small.module(lambda rngs: DeltaInputs(config, 2, 8, 8, rngs=rngs))
    parameters["beta"]["kernel"] = np.full((16, 4), 50.0)
    x = numerics.cast(abs(numerics.normal(np.random.default_rng(1), 1, 64, 16)), "bfloat16")
    run = numerics.jit(lambda parameters, x: nnx.merge(graph, parameters)(x, segment_ids=None, past={})[0])
    _, k, _, beta = run(numerics.cast(parameters, "float32"), x)
    square = np.sum(np.asarray(k, np.float64) ** 2, axis=-1)
    assert square.min() < 0.999 and square.max() > 1.001
    eigenvalues = 1 - np.asarray(beta) * square
    assert eigenvalues.min() == pytest.approx(-1, abs=1e-6)
