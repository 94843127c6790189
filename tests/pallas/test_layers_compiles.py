"""Layers of published sizes, compiled for TPUs that are absent: what XLA puts around the kernels."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear.costs import targets
from jaxlinear.models import ModelConfig, mixers, presets
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import sharding
from tests import compiled_text

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

# Mixer, preset, mesh of 4 devices, and the numbers that a token has in the smallest array as long as the sequence.
CASES = [
    ("rg_lru", "griffin_1b3", {"fsdp": 2, "tensor": 2}, 1280),
    ("delta_net", "delta_net_1b3", {"fsdp": 4}, 1024),
    ("kda", "delta_net_1b3", {"fsdp": 2, "tensor": 2}, 1024),
    ("gla", "gla_1b3", {"fsdp": 2, "tensor": 2}, 128),
    ("mamba2", "mamba2_1b3", {"fsdp": 2, "tensor": 2}, 128),
]


def compiled(mixer, preset, sizes):
    """The text of the mixer's program for v5e, forward and backward, and B, T of a device."""
    config = ModelConfig(**presets.find(preset) | {"vocab_size": 512, "dtype": "bfloat16"})
    mesh = meshes.make_mesh({axis: sizes.get(axis, 1) for axis in meshes.AXES}, targets.find("v5e:2x2").devices)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: mixers.find(mixer)(config, rngs=nnx.Rngs(0))))

    def both(parameters, x, ids, d_y):
        layer = lambda parameters, x: nnx.merge(graph, parameters)(x, segment_ids=ids)[0]  # noqa: E731
        y, pullback = jax.vjp(layer, parameters, x)
        return y, pullback(d_y)

    def placed(y, *axes):
        return jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    own = 2, 8192
    tokens = own[0] * sizes["fsdp"], own[1]
    x = placed(jax.ShapeDtypeStruct((*tokens, config.width), jnp.bfloat16), "fsdp")
    ids = placed(jax.ShapeDtypeStruct(tokens, jnp.int32), "fsdp")
    with sharding.use_mesh(mesh):
        return jax.jit(both).lower(jax.tree.map(placed, parameters), x, ids, x).compile().as_text(), own


@pytest.mark.slow(but=["rg_lru-griffin_1b3--"])
@pytest.mark.parametrize(
    "mixer, preset, sizes, numbers", CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_nothing_is_rearranged(mixer, preset, sizes, numbers):
    """No array as long as the sequence is copied, transposed or given other tiles, forward or backward, on a mesh."""
    text, tokens = compiled(mixer, preset, sizes)
    kernels = {"delta_net": "delta_rule", "kda": "delta_rule", "rg_lru": "rg_lru"}.get(mixer, "linear_attention")
    assert len(compiled_text.kernels(text, kernels)) == 2
    assert not compiled_text.rearrangements(text, math.prod(tokens) * numbers)


@pytest.mark.slow(but=["griffin_1b3"])
@pytest.mark.parametrize("preset", ["griffin_1b3", "samba_1b3"])
def test_rotary_positions_split_no_heads(preset):
    """Parts of heads of 128 channels would be arrays that are padded to 128 channels."""
    text, (batch, length) = compiled("sliding_window", preset, {"fsdp": 4})
    heads = [shape for shape in compiled_text.with_last_axis(text, 128) if shape.startswith(f"{batch},{length},")]
    assert heads
    assert not [shape for shape in compiled_text.with_last_axis(text, 32, 64) if shape.startswith(f"{batch},{length},")]
