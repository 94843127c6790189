"""What a mixer is: the part of a layer that mixes over time. The block around it is the same for all."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import DEFAULT_INIT, Initializer, Linear, fan_in_normal
from jaxlinear.ops import dtypes

State = dict[str, jax.Array]


class Mixer(nnx.Module):
    """``Mixer(config, layer=..., rngs=...)`` builds one; a few depend on their place in the model.

    ``mixer(x, segment_ids=None, state=None) -> (y, state)`` runs it over ``[B, T, D]``, from an empty past or from a state;
    ``mixer.init_state(batch)`` is the empty past. A state is a pytree of arrays with B first, whose size does not depend on
    the number of tokens seen.
    """

    # Keys of the config section ``model`` that this mixer reads and some others do not: patterns without a mixer that
    # reads them refuse them (tests/models/test_options.py).
    READS: ClassVar[tuple[str, ...]] = ()
    # Whether time may be sharded: everything the mixer does over time goes through ``jaxlinear.parallel.operations``. Other
    # mixers are refused there, since the compiler would silently gather their whole sequence.
    OVER_SEQUENCE: ClassVar[bool] = False
    # Functions by parameter name: ``function(rows [L, ...]) -> [L, ...]`` takes that parameter of every layer of this
    # mixer, in order, and returns what the mixer of each layer sees in its place.
    ACROSS_LAYERS: ClassVar[Mapping[str, Callable[[jax.Array], jax.Array]]] = {}

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        raise NotImplementedError

    def init_state(self, batch: int) -> Any:
        raise NotImplementedError

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: Any = None
    ) -> tuple[jax.Array, Any]:
        raise NotImplementedError

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """FLOPs of one token in a sequence of ``length``, forward (``models.flops``)."""
        raise NotImplementedError

    @classmethod
    def rotary_width(cls, config: ModelConfig) -> int:
        """Channels of a head of which rotary positions turn ``model.rotary_fraction``; 0 for mixers without."""
        return 0


class MatrixMixer(Mixer):
    """What mixers with H heads and a state ``memory [B, H, K, V]`` share, those of linear attention and the delta rule."""

    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig):
        self.heads, self.key_width, self.value_width = self.widths(config)
        self.dtype = config.activation_dtype

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int, int]:
        """H, K and V. Over all heads, K and V each add up to D, unless they are given."""
        return cls.widths_of(config, config.width, config.width)

    @classmethod
    def widths_of(cls, config: ModelConfig, keys: int, values: int) -> tuple[int, int, int]:
        """H, K and V of heads that have so many key and value channels together, unless K and V are given."""
        heads = config.heads
        key = config.key_width or per_head(cls, keys, heads)
        return heads, key, config.value_width or per_head(cls, values, heads)

    def init_state(self, batch: int) -> State:
        shape = batch, self.heads, self.key_width, self.value_width
        return {"memory": jnp.zeros(shape, dtypes.wide(self.dtype))}

    def project_keys(self, config: ModelConfig, *, init: Initializer = DEFAULT_INIT, rngs: nnx.Rngs) -> Linear:
        """``[B, T, D]`` -> ``[B, T, H K]``."""
        return project(config, self.heads * self.key_width, init=init, rngs=rngs)

    def project_values(self, config: ModelConfig, *, init: Initializer = DEFAULT_INIT, rngs: nnx.Rngs) -> Linear:
        """``[B, T, D]`` -> ``[B, T, H V]``."""
        return project(config, self.heads * self.value_width, init=init, rngs=rngs)

    def project_out(self, config: ModelConfig, *, init: Initializer | None = None, rngs: nnx.Rngs) -> Linear:
        """``[B, T, H V]`` -> ``[B, T, D]``."""
        init = init or fan_in_normal(2 / config.num_layers)
        inner = self.heads * self.value_width
        return Linear(inner, config.width, axes=("heads", "embed"), bias=False, init=init, rngs=rngs)


def project(config: ModelConfig, outputs: int, *, init: Initializer = DEFAULT_INIT, rngs: nnx.Rngs) -> Linear:
    """``[B, T, D]`` to the channels of all heads, without a bias."""
    return Linear(config.width, outputs, axes=("embed", "heads"), bias=False, init=init, rngs=rngs)


def per_head(mixer: type, channels: int, heads: int) -> int:
    """Channels per head, if the config does not give them."""
    if not channels or channels % heads:  # half of a width of 1 is 0
        raise UserError(
            f"{name_of(mixer)}: {heads} heads do not divide {channels} channels; change model.recurrent_heads or "
            "model.num_heads, or set model.key_width and model.value_width"
        )
    return channels // heads


def name_of(mixer: type) -> str:
    """The name of a mixer of this package: that of its file."""
    return mixer.__module__.rpartition(".")[2]
