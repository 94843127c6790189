"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): softmax's exp(q k) becomes phi(q) phi(k).

    S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      o_t = phi(q_t) S_t / (phi(q_t) z_t)      y_t = W_o o_t

| ``model.feature_map`` | phi(x), x of K channels | K per head |
| --- | --- | --- |
| elu | elu(x) + 1 (arXiv:2006.16236) | D / H |
| relu | max(x, 0) (Kasai et al. 2021, arXiv:2103.13076) | D / H |
| taylor | 1, x / K^(1/4), x x^T / sqrt(2 K): exp(q k / sqrt K) to second order (Based, arXiv:2402.18668) | 16 |
| rebased | x' x'^T / K, x' = norm(x) scale + bias: (q' k' / K)^2 (ReBased, arXiv:2402.10644) | 16 |
| hedgehog | softmax(W x), softmax(-W x), W of each head (Zhang et al. 2024, arXiv:2402.04347) | D / H |
| identity | x; no z_t: o_t = norm(K^-1/2 q_t S_t) (TransNormer, arXiv:2210.10340) | D / H |

All but identity divide by z, as their papers do; z is one more value channel, of ones. Identity has an RMSNorm per head
instead. Of a symmetric product x x^T each pair of channels is kept once, times sqrt 2. Queries and keys have separate maps:
rebased starts with scale 1 and bias 0, hedgehog with W = 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import HeadNorm, by_head
from jaxlinear.models.layers import parameter
from jaxlinear.models.mixer import MatrixMixer, State, per_head
from jaxlinear.ops import dtypes
from jaxlinear.ops.linear_attention.op import flops as linear_attention_flops
from jaxlinear.parallel import operations

PRODUCT_WIDTH = 16  # K where phi has the products of all pairs of channels
# Added to phi(q) z. With relu and rebased that can be 0, together with phi(q) S. With the others it is positive, but
# hedgehog's, a product of two softmaxes, may be far below 1e-6; the gradient divides by its square, which float32 has to
# hold.
_EPSILON = {"relu": 1e-6, "rebased": 1e-6}
_LEAST = 1e-18


def features(feature_map: str, key_width: int) -> int:
    """The number of channels of phi(x)."""
    pairs = key_width * (key_width + 1) // 2
    return {"taylor": 1 + key_width + pairs, "rebased": pairs, "hedgehog": 2 * key_width}.get(feature_map, key_width)


class LinearAttention(MatrixMixer):
    """Linear attention over ``[B, T, D]``. State: ``memory [B, H, F, V]``, or ``[B, H, F, V + 1]`` with z; F features."""

    READS = ("num_heads", "recurrent_heads", "key_width", "value_width", "feature_map")

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config)
        name = config.feature_map
        self.features = features(name, self.key_width)
        self.query, self.key = (self.project_keys(config, rngs=rngs) for _ in range(2))
        self.value = self.project_values(config, rngs=rngs)
        self.query_map, self.key_map = (_feature_map(name, self.heads, self.key_width, rngs) for _ in range(2))
        # ReBased's weights are squares, down to 0. From features rounded to bfloat16 they would come out with either sign,
        # and their sum, which is divided by, would now and then be about 0.
        self.rounded = name != "rebased"
        self.epsilon = _EPSILON.get(name, _LEAST)
        self.norm = (
            HeadNorm(self.value_width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
            if name == "identity"
            else None
        )
        self.out = self.project_out(config, rngs=rngs)

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int, int]:
        """H, K before the feature map, and V: D / H, or K = 16 where phi has products, unless they are given."""
        heads = config.heads
        products = config.feature_map in ("taylor", "rebased")
        key = config.key_width or (PRODUCT_WIDTH if products else per_head(cls, config.width, heads))
        return heads, key, config.value_width or per_head(cls, config.width, heads)

    def init_state(self, batch: int) -> State:
        shape = (batch, self.heads, self.features, self.value_width + (self.norm is None))
        return {"memory": jnp.zeros(shape, dtypes.wide(self.dtype))}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        wide = dtypes.wide(x.dtype)
        dtype = x.dtype if self.rounded else wide
        q, k, v = (by_head(project(x), self.heads) for project in (self.query, self.key, self.value))
        q, k = (phi(y.astype(wide)).astype(dtype) for phi, y in ((self.query_map, q), (self.key_map, k)))
        v = v.astype(dtype)
        past = None if state is None else state["memory"]
        if self.norm is None:
            v = jnp.concatenate([v, jnp.ones_like(v, shape=(*v.shape[:3], 1))], axis=-1)
            o, memory = operations.linear_attention(q, k, v, None, past, scale=1.0, segment_ids=segment_ids)
            o = o.astype(wide)
            o = (o[..., :-1] / (o[..., -1:] + self.epsilon)).astype(x.dtype).reshape(*x.shape[:2], -1)
        else:
            o, memory = operations.linear_attention(q, k, v, None, past, segment_ids=segment_ids)
            o = self.norm(o.reshape(*x.shape[:2], -1))
        return self.out(o), {"memory": memory}

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Queries and keys D x H K, values and output D x H V, Hedgehog's maps K x K of queries and keys in each head, and
        the recurrence of the features, with one more value channel unless the map is the identity; no decay."""
        h, k, v = cls.widths(config)
        maps = 2 * 2 * h * k * k if config.feature_map == "hedgehog" else 0
        values = v if config.feature_map == "identity" else v + 1
        recurrence = linear_attention_flops(h, features(config.feature_map, k), values, decays=False)
        return 2 * config.width * h * (2 * k + 2 * v) + maps + recurrence


class Rebased(nnx.Module):
    """ReBased's map of ``[B, T, H, K]``, with each head first normalised to mean 0 and variance 1.

    The joint magnitude of scale and bias in a head is divided out. It cancels in the division by z anyway; but as it grows,
    weights near 0, which are sums of terms that cancel, would come out as far below 0 as ``_EPSILON`` is above.
    """

    def __init__(self, heads: int, width: int, *, rngs: nnx.Rngs):
        self.scale = parameter(nnx.initializers.ones, (heads * width,), ("heads",), rngs)
        self.bias = parameter(nnx.initializers.zeros, (heads * width,), ("heads",), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (y[...].astype(x.dtype).reshape(1, 1, *x.shape[2:]) for y in (self.scale, self.bias))
        size = jax.lax.rsqrt(jnp.mean(scale * scale + bias * bias, axis=-1, keepdims=True) + 1e-12)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        return _pairs(x * (size * scale) + size * bias) / x.shape[-1]


class Hedgehog(nnx.Module):
    """Hedgehog's map of ``[B, T, H, K]``, with a K x K matrix per head."""

    def __init__(self, heads: int, width: int, *, rngs: nnx.Rngs):
        identity = lambda key, shape, dtype: jnp.broadcast_to(jnp.eye(width, dtype=dtype), shape)  # noqa: E731
        self.kernel = parameter(identity, (heads, width, width), ("heads", None, None), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = operations.parameter_product("bthi,hij->bthj", x, self.kernel[...])
        return jnp.concatenate([jax.nn.softmax(x, axis=-1), jax.nn.softmax(-x, axis=-1)], axis=-1)


def _identity(x: jax.Array) -> jax.Array:
    return x


def _elu(x: jax.Array) -> jax.Array:
    """elu(x) + 1, which is exp(x) below 0."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def _taylor(x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    one = jnp.ones_like(x, shape=(*x.shape[:-1], 1))
    return jnp.concatenate([one, x * width**-0.25, _pairs(x) * (2 * width) ** -0.5], axis=-1)


def _pairs(x: jax.Array) -> jax.Array:
    """``[..., K]`` -> ``[..., K (K + 1) / 2]``, so that the product of two results is the square of that of their x."""
    width = x.shape[-1]
    weights = np.concatenate([[1.0] + [2.0**0.5] * (width - i - 1) for i in range(width)])
    products = jnp.concatenate([x[..., i : i + 1] * x[..., i:] for i in range(width)], axis=-1)
    return products * jnp.asarray(weights, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


_FIXED = {"identity": _identity, "elu": _elu, "relu": jax.nn.relu, "taylor": _taylor}
_LEARNED = {"rebased": Rebased, "hedgehog": Hedgehog}


def _feature_map(name: str, heads: int, width: int, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    return _LEARNED[name](heads, width, rngs=rngs) if name in _LEARNED else _FIXED[name]
