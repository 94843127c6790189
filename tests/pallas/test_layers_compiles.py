"""Layers of published sizes, compiled for TPUs that are absent: what XLA puts around the kernels."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear.models import ModelConfig, mixers, presets
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import sharding, targets
from tests import compiled_text

pytestmark = pytest.mark.compiles_ahead

# Mixer, preset, mesh of 4 devices, and the numbers that a token has in the smallest array as long as the sequence.
CASES = [
    ("rg_lru", "griffin_1b3", {"fsdp": 2, "tensor": 2}, 1280),
    ("delta_net", "delta_net_1b3", {"fsdp": 4}, 1024),
    ("gla", "gla_1b3", {"fsdp": 2, "tensor": 2}, 128),
    ("mamba2", "mamba2_1b3", {"fsdp": 2, "tensor": 2}, 128),
]


@pytest.mark.some_cases("rg_lru-griffin_1b3--")
@pytest.mark.parametrize(
    "mixer, preset, sizes, numbers", CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_nothing_is_rearranged(mixer, preset, sizes, numbers):
    """No array as long as the sequence is copied, transposed or given other tiles, forward or backward, on a mesh."""
    config = ModelConfig(**presets.find(preset) | {"vocab_size": 512, "dtype": "bfloat16"})
    mesh = meshes.make_mesh({axis: sizes.get(axis, 1) for axis in meshes.AXES}, targets.find("v5e:2x2").devices)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: mixers.find(mixer)(config, rngs=nnx.Rngs(0))))

    def both(parameters, x, ids, d_y):
        layer = lambda parameters, x: nnx.merge(graph, parameters)(x, segment_ids=ids)[0]  # noqa: E731
        y, pullback = jax.vjp(layer, parameters, x)
        return y, pullback(d_y)

    def placed(y, *axes):
        return jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    tokens = 2 * sizes["fsdp"], 8192
    x = placed(jax.ShapeDtypeStruct((*tokens, config.width), jnp.bfloat16), "fsdp")
    ids = placed(jax.ShapeDtypeStruct(tokens, jnp.int32), "fsdp")
    with sharding.use_mesh(mesh):
        text = jax.jit(both).lower(jax.tree.map(placed, parameters), x, ids, x).compile().as_text()
    of_mixer = {"delta_net": ("delta_rule",), "rg_lru": ("rg_lru",)}
    kernels = of_mixer.get(mixer, ("linear_attention",))
    assert all(len(compiled_text.kernels(text, name)) == 2 for name in kernels)
    assert not compiled_text.rearrangements(text, math.prod(tokens) // sizes["fsdp"] * numbers)
