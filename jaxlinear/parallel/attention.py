"""Softmax attention on the mesh in use. Where the mesh spreads time, a window receives the keys and values before its shard
(``parallel.halos``); causal attention gathers them all, or has them go round the shards (``parallel.ring``)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear import ops
from jaxlinear.ops import dtypes
from jaxlinear.ops.attention.op import CAUSAL_ATTENTION
from jaxlinear.ops.attention.sliding_window import SLIDING_WINDOW_ATTENTION
from jaxlinear.ops.spec import Spec
from jaxlinear.parallel import cost, halos, ring, sharding
from jaxlinear.parallel.exchanges import AXIS
from jaxlinear.parallel.on_mesh import on_mesh
from jaxlinear.parallel.sequence import kind_and_span, time_mesh
from jaxlinear.parallel.sharding import TIME, AnyMesh, on_shards

NO_DOCUMENT = -(2**31)  # the id of positions before the sequence

# Keys [B, P, G, K], values [B, P, G, V] and segment ids [B, P] of the tokens before a sequence. A sequence without segment
# ids has the id 0 throughout.
Past = tuple[jax.Array, jax.Array, jax.Array]


def sliding_window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    past: Past | None = None,
    backend: str = "auto",
) -> jax.Array:
    """``ops.sliding_window_attention`` of T queries over their T keys and, in front of these, the ``past``: keys
    ``[B, P, G, K]``, values ``[B, P, G, V]`` and segment ids ``[B, P]`` of earlier tokens, with P at least
    ``window - 1``."""
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    mesh = time_mesh("sliding_window_attention", q.shape[1])
    if mesh is None:
        return _unsharded(
            SLIDING_WINDOW_ATTENTION, q, k, v, segment_ids, past, window=window, scale=scale, backend=backend
        )
    attend = functools.partial(ops.sliding_window_attention, window=window, scale=scale)

    none = jnp.zeros_like(k, shape=(k.shape[0], window - 1, *k.shape[2:]))
    before = past or (none, jnp.zeros_like(v, shape=(*none.shape[:3], v.shape[-1])), None)

    def local(q, k, v, ids, past_k, past_v, past_ids):
        ids = jnp.zeros_like(q, shape=q.shape[:2], dtype=jnp.int32) if ids is None else ids
        if past_ids is None:
            past_ids = jnp.full((ids.shape[0], window - 1), NO_DOCUMENT, ids.dtype)
        earlier = (
            halos.before(x, window - 1, y[:, -(window - 1) :]) for x, y in ((k, past_k), (v, past_v), (ids, past_ids))
        )
        k, v, ids = (jnp.concatenate([x, y], axis=1) for x, y in zip(earlier, (k, v, ids), strict=True))
        return attend(q, k, v, segment_ids=ids, backend=backend)

    heads = _head_axis(mesh, q.shape[2], k.shape[2])
    own, others = (*TIME, heads, None), ("batch", None, heads, None)
    axes = own, own, own, TIME, others, others, ("batch", None)
    return on_shards(mesh, local, 0, (q, k, v, segment_ids, *before), axes)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    past: Past | None = None,
    backend: str = "auto",
) -> jax.Array:
    """``ops.causal_attention``, with a ``past`` of any length as in ``sliding_window_attention``. Where time is spread,
    either every shard gathers all keys and values (LASP-2H, arXiv:2502.07563, section 3.4), or these go round the
    shards (``parallel.ring``)."""
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    mesh = time_mesh("causal_attention", q.shape[1])
    if mesh is None:
        return _unsharded(CAUSAL_ATTENTION, q, k, v, segment_ids, past, scale=scale, backend=backend)
    attend = functools.partial(ops.causal_attention, scale=scale)

    def by_ring(q, k, v, ids, *past):
        return ring.causal_attention(q, k, v, ids, past or None, scale)

    def gathered(q, k, v, ids, *past):
        offset = lax.axis_index(AXIS) * q.shape[1]
        k, v = (lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v))
        ids = None if ids is None else lax.all_gather(ids, AXIS, axis=1, tiled=True)
        if past:
            k, v, ids = _after_past(past, k, v, ids)
            offset += past[0].shape[1]
        return attend(q, k, v, segment_ids=ids, offset=offset, backend=backend)

    heads = _head_axis(mesh, q.shape[2], k.shape[2])
    own, others = (*TIME, heads, None), ("batch", None, heads, None)
    axes = own, own, own, TIME, *((others, others, ("batch", None)) if past else ())
    local = {"all_gather": gathered, "ring": by_ring}[_attention_exchange(mesh, k, v, own)]
    return on_shards(mesh, local, 0, (q, k, v, segment_ids, *(past or ())), axes)


def _unsharded(spec: Spec, q, k, v, segment_ids, past, **options):
    """Attention over whole sequences."""
    k, v, segment_ids = _after_past(past, k, v, segment_ids)
    mesh = sharding.mesh_in_use()
    axis = None if mesh is None else _head_axis(mesh, q.shape[2], k.shape[2])
    return on_mesh(spec)(q, k, v, segment_ids=segment_ids, channels=axis, **options)


def _attention_exchange(mesh: AnyMesh, k: jax.Array, v: jax.Array, axes: tuple) -> str:
    """One of ``cost.ATTENTION``, for keys and values sharded by these logical axes."""
    own = [jax.ShapeDtypeStruct(sharding.shard_shape(axes, x.shape, mesh), x.dtype) for x in (k, v)]
    wide = [jax.ShapeDtypeStruct(x.shape, dtypes.wide(x.dtype)) for x in own]
    load = cost.KeysAndValues(mesh.shape[AXIS], cost.size_of(own), cost.size_of(wide))
    return cost.choose_attention(sharding.choices_in_use().attention, load, *kind_and_span(mesh))


def _after_past(past: Past | None, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None):
    """Keys, values and segment ids with the past in front of them."""
    if past is None:
        return k, v, segment_ids
    ids = jnp.zeros_like(past[2], shape=k.shape[:2]) if segment_ids is None else segment_ids
    return (jnp.concatenate([earlier, own], axis=1) for earlier, own in zip(past, (k, v, ids), strict=True))


def _head_axis(mesh: AnyMesh, heads: int, groups: int) -> str | None:
    """The logical axis of attention heads: none where a device would hold heads without their group's keys."""
    tensor = mesh.shape.get("tensor", 1)
    return "heads" if groups == 1 or groups % tensor == 0 or heads % tensor else None
