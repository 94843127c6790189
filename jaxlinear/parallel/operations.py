"""The operations on the mesh in use: those of ``jaxlinear.ops``, with the same names and contracts, for global arrays.

Where the mesh spreads time, each one runs under ``shard_map`` on its shard: recurrences exchange their states
(``parallel.sequence``), and windows and convolutions receive the positions before their shard (``parallel.halos``).
Otherwise they are the plain operations. Models call these, by this module's name; softmax attention and what has the
vocabulary's table are in modules of their own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import (
    diagonal,
    diagonal_kernel,
    dtypes,
    matrix_states,
    recurrence,
    selective_scan_maps,
)
from jaxlinear.ops.delta_rule import choose as choose_delta_rule
from jaxlinear.ops.gated_rms_norm import choose as choose_gated_norm
from jaxlinear.ops.linear_attention import choose as choose_attention
from jaxlinear.ops.rg_lru import choose as choose_rg_lru
from jaxlinear.ops.rg_lru_gates import choose as choose_gates
from jaxlinear.ops.selective_scan import choose as choose_selective_scan
from jaxlinear.ops.short_convolution import choose as choose_short_convolution
from jaxlinear.parallel import halos, sharding
from jaxlinear.parallel.attention import NO_DOCUMENT, Past, causal_attention, sliding_window_attention
from jaxlinear.parallel.exchanges import AXIS
from jaxlinear.parallel.sequence import Spread, time_mesh
from jaxlinear.parallel.sharding import TIME, on_shards
from jaxlinear.parallel.vocabulary import linear_cross_entropy, rows, token_losses

__all__ = [
    "NO_DOCUMENT",
    "Past",
    "after",
    "causal_attention",
    "causal_convolution",
    "delta_rule",
    "document_starts",
    "gated_rms_norm",
    "linear_attention",
    "linear_cross_entropy",
    "linear_recurrence",
    "parameter_product",
    "rg_lru",
    "rg_lru_gates",
    "rows",
    "selective_scan",
    "short_convolution",
    "sliding_window_attention",
    "token_losses",
]


def linear_recurrence(a: jax.Array, x: jax.Array, initial_state: jax.Array | None = None, **options: Any):
    """``ops.linear_recurrence``; D is sharded by the logical axis ``recurrent``. The kernel runs on each device's part,
    since the compiler cannot split it."""
    runner, mesh = _runner("linear_recurrence", x.shape[1], "recurrent"), sharding.mesh_in_use()
    spread = runner is not recurrence.WHOLE
    if mesh is None or mesh.size == 1 or spread or diagonal.choose(options.get("backend", "auto"), a, x) != "pallas":
        return ops.linear_recurrence(a, x, initial_state, runner=runner, **options)
    segment_ids, reverse = options.get("segment_ids"), options.get("reverse", False)
    if initial_state is None:
        initial_state = diagonal_kernel.no_state(a, x)

    def local(a, x, state, ids):
        return ops.linear_recurrence(a, x, state, segment_ids=ids, reverse=reverse, backend="pallas")

    inner = ("recurrent", *(None,) * x.ndim)[: x.ndim - 2]
    axes_of_a = (*TIME, *inner) if a.ndim == x.ndim else inner[len(inner) - a.ndim :]
    axes = axes_of_a, (*TIME, *inner), ("batch", *inner), TIME
    return on_shards(mesh, local, (1, 2), (a, x, initial_state, segment_ids), axes)


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array | None,
    B: jax.Array,
    C: jax.Array,
    initial_state: jax.Array | None = None,
    **options: Any,
):
    """``ops.selective_scan``; D is sharded by the logical axis ``recurrent``. The kernel runs on each device's part,
    since the compiler cannot split it."""
    runner, mesh = _runner("selective_scan", x.shape[1], "recurrent"), sharding.mesh_in_use()
    spread, backend = runner is not recurrence.WHOLE, options.get("backend", "auto")
    if mesh is not None and mesh.size > 1 and not spread:
        own = jax.ShapeDtypeStruct((*x.shape[:2], sharding.shard_shape(("recurrent",), x.shape[2:], mesh)[0]), x.dtype)
        backend = choose_selective_scan(backend, own, dt, A, B, C, options.get("chunk_size"))
    if mesh is None or mesh.size == 1 or spread or backend != "pallas":
        return ops.selective_scan(x, dt, A, B, C, initial_state, runner=runner, **options)
    if initial_state is None:
        initial_state = selective_scan_maps.no_state(x, dt, A, B, C)
    # Widened, as their gradients are summed over the devices, each of which has some of the channels.
    B, C = (y.astype(dtypes.wide(y.dtype)) for y in (B, C))

    def local(x, dt, A, B, C, state, ids):
        return ops.selective_scan(x, dt, A, B, C, state, segment_ids=ids, backend="pallas")

    of_time, of_keys = (*TIME, "recurrent"), (*TIME, None)
    axes = of_time, of_time, ("recurrent", None), of_keys, of_keys, ("batch", "recurrent", None), TIME
    return on_shards(mesh, local, (0, 5), (x, dt, A, B, C, initial_state, options.get("segment_ids")), axes)


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    **options: Any,
):
    """``ops.linear_attention``."""
    return _with_matrix_state(ops.linear_attention, choose_attention, (q, k, v), log_decay, initial_state, options)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    **options: Any,
):
    """``ops.delta_rule``."""
    negative = options.get("negative_eigenvalues", False)
    choose = functools.partial(choose_delta_rule, negative_eigenvalues=negative)
    return _with_matrix_state(ops.delta_rule, choose, (q, k, v, beta), log_decay, initial_state, options)


def _with_matrix_state(
    operation: Callable[..., Any],
    choose: Callable[..., str],
    inputs: tuple[jax.Array, ...],
    log_decay: jax.Array | None,
    state: jax.Array | None,
    options: dict[str, Any],
):
    """An operation on ``inputs``, which include q, k and v. Its kernel runs on each device's part, since the compiler
    cannot split it."""
    q, k, v = inputs[:3]
    choose = functools.partial(_on_a_device, choose)
    runner, mesh = _runner(operation.__name__, q.shape[1], "heads"), sharding.mesh_in_use()
    spread, chunk_size = runner is not recurrence.WHOLE, options.get("chunk_size")
    whole, backend = mesh is None or mesh.size == 1 or spread, options.get("backend", "auto")
    if operation is ops.linear_attention and matrix_states.is_shared(q, v):
        backend, q, k = matrix_states.choose_shared(choose, backend, q, k, v, log_decay, chunk_size, runner)
        if not matrix_states.is_shared(q, v):
            q, k = (sharding.constrain(x, "batch", "time", "heads", None) for x in (q, k))
        inputs = q, k, *inputs[2:]
    elif not whole:
        backend = choose(backend, q, k, v, chunk_size, by_channel=matrix_states.is_by_channel(log_decay))
    if whole or backend != "pallas":
        return operation(*inputs, log_decay, state, runner=runner, **options)
    assert mesh is not None

    def local(state, log_decay, ids, *inputs):
        return operation(*inputs, log_decay, state, **options | {"segment_ids": ids, "backend": "pallas"})

    by_head = *TIME, "heads", None, None
    of_decay = None if log_decay is None else ("heads",) if log_decay.ndim == 1 else by_head[: log_decay.ndim]
    arguments = (
        matrix_states.no_state(q, k, v) if state is None else state,
        log_decay,
        options.get("segment_ids"),
        *inputs,
    )
    of_keys = (*TIME, None, None) if matrix_states.is_shared(q, v) else by_head
    of_inputs = ((of_keys if i < 2 else by_head)[: x.ndim] for i, x in enumerate(inputs))
    axes = ("batch", "heads", None, None), of_decay, TIME, *of_inputs
    # o is sharded like v, or like q where a token has several values, and the last state like the first.
    return on_shards(mesh, local, (5 if v.ndim == q.ndim else 3, 0), arguments, axes)


def _on_a_device(choose: Callable[..., str], backend: str, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> str:
    """``choose`` for the rows, heads and widths that a device has of them."""
    mesh = sharding.mesh_in_use()

    def part(x):
        axes = ("batch", None, "heads", *(None,) * (x.ndim - 3))
        return jax.ShapeDtypeStruct(x.shape if mesh is None else sharding.shard_shape(axes, x.shape, mesh), x.dtype)

    return choose(backend, part(q), part(k), part(v), *rest, **options)


# Logical axes of what ``rg_lru_gates`` takes.
_BLOCKS, _CHANNELS = ("heads", None, None), ("recurrent",)
_OF_GATES = (*TIME, "recurrent"), _BLOCKS, _CHANNELS, _BLOCKS, _CHANNELS, _CHANNELS, TIME


def rg_lru(
    x: jax.Array,
    recurrence_kernel: jax.Array,
    recurrence_bias: jax.Array,
    input_kernel: jax.Array,
    input_bias: jax.Array,
    rate: jax.Array,
    first: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """``ops.rg_lru``, sharded as ``rg_lru_gates`` and ``linear_recurrence``. The kernel runs on each device's part, since
    the compiler cannot split it; where time is spread, the gates and the recurrence are separate."""
    recurrence_kernel, input_kernel = _as_their_gradients_are_summed(x, recurrence_kernel, input_kernel)
    given = x, recurrence_kernel, recurrence_bias, input_kernel, input_bias, rate, first
    if time_mesh("rg_lru", x.shape[1]) is not None:
        if backend == "pallas":
            raise UserError(
                "rg_lru: the kernel needs whole rows, and mesh.sequence spreads them; use backend='separate'"
            )
        backend = "separate"
    if choose_rg_lru(backend, *_gates_of_a_device(x, recurrence_kernel)) != "pallas":
        return linear_recurrence(*rg_lru_gates(*given), initial_state, segment_ids=segment_ids)
    mesh, run = sharding.mesh_in_use(), functools.partial(ops.rg_lru, backend="pallas")
    if mesh is None or mesh.size == 1:
        return run(*given, initial_state, segment_ids=segment_ids)
    if initial_state is None:
        initial_state = diagonal_kernel.no_state(x, x)
    axes = *_OF_GATES, ("batch", *_CHANNELS), TIME
    local = lambda *given: run(*given[:-1], segment_ids=given[-1])  # noqa: E731
    return on_shards(mesh, local, (0, len(given)), (*given, initial_state, segment_ids), axes)


def rg_lru_gates(
    x: jax.Array,
    recurrence_kernel: jax.Array,
    recurrence_bias: jax.Array,
    input_kernel: jax.Array,
    input_bias: jax.Array,
    rate: jax.Array,
    first: jax.Array,
    *,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """``ops.rg_lru_gates``; R is sharded by the logical axis ``recurrent`` and blocks by ``heads``. The kernel runs on each
    device's part, since the compiler cannot split it."""
    recurrence_kernel, input_kernel = _as_their_gradients_are_summed(x, recurrence_kernel, input_kernel)
    arguments = x, recurrence_kernel, recurrence_bias, input_kernel, input_bias, rate, first
    mesh = sharding.mesh_in_use()
    if mesh is None or mesh.size == 1:
        return ops.rg_lru_gates(*arguments, backend=backend)
    if choose_gates(backend, *_gates_of_a_device(x, recurrence_kernel)) != "pallas":
        return ops.rg_lru_gates(*arguments, backend="products")
    return on_shards(mesh, functools.partial(ops.rg_lru_gates, backend="pallas"), (0, 0), arguments, _OF_GATES)


def _as_their_gradients_are_summed(x: jax.Array, *kernels: jax.Array) -> tuple[jax.Array, ...]:
    """Devices sum the gradients of W_a and W_x in the dtype that ``parallel.gradient_dtype`` names."""
    if sharding.choices_in_use().gradient_dtype == "float32":
        return kernels
    return tuple(y.astype(x.dtype) for y in kernels)


def _gates_of_a_device(*arrays: jax.Array) -> list[jax.ShapeDtypeStruct]:
    """The first of the arguments of ``rg_lru_gates`` as a device has them."""
    mesh = sharding.mesh_in_use()
    shapes = [
        y.shape if mesh is None else sharding.shard_shape(axes, y.shape, mesh)
        for y, axes in zip(arrays, _OF_GATES, strict=False)
    ]
    return [jax.ShapeDtypeStruct(shape, y.dtype) for shape, y in zip(shapes, arrays, strict=True)]


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """``ops.segments.starts``: ``[B, T]`` bool, where a document begins inside the row."""
    return _runner("document_starts", segment_ids.shape[1], None).starts(segment_ids)


def after(x: jax.Array, inputs: Any) -> jax.Array:
    """x ``[B, T, ...]``. Where time is spread, whatever is computed from it waits for the ``inputs`` of a recurrence,
    arrays ``[B, T, ...]``, and so overlaps the exchange of states, which nothing would overlap otherwise."""
    return x if time_mesh("after", x.shape[1]) is None else lax.optimization_barrier((x, inputs))[0]


def causal_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    channels: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``ops.causal_convolution``; ``channels`` is the logical axis of D."""
    mesh = time_mesh("causal_convolution", x.shape[1])
    if mesh is None or kernel.shape[0] == 1:  # no token sees another one
        return ops.causal_convolution(x, kernel, bias, state, segment_ids=segment_ids)
    width = kernel.shape[0]
    if state is None:
        state = jnp.zeros_like(x, shape=(x.shape[0], width - 1, x.shape[2]))

    def local(x, kernel, bias, state, ids):
        past = halos.before(x, width - 1, state)
        if ids is not None:
            ids = jnp.concatenate([halos.ids_before(ids, width - 1), ids], axis=1)
        y, final = ops.causal_convolution(jnp.concatenate([past, x], axis=1), kernel, bias, segment_ids=ids)
        return y[:, width - 1 :], _of_last_shard(final)

    axes = (*TIME, channels), (None, channels), (channels,), ("batch", None, channels), TIME
    return on_shards(mesh, local, (0, 3), (x, kernel, bias, state, segment_ids), axes)


def short_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    channels: str | None = None,
    activation: str = "silu",
    heads: int | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array] | None:
    """``ops.short_convolution`` as a kernel, on each device's part, since the compiler cannot split it; or None where that
    does not run and XLA should fuse the operation's parts with what is around them. ``channels`` is the logical axis of
    D."""
    mesh, axes = sharding.mesh_in_use(), (*TIME, channels)
    own = jax.ShapeDtypeStruct(x.shape if mesh is None else sharding.shard_shape(axes, x.shape, mesh), x.dtype)
    own_heads, rest = divmod((heads or 0) * own.shape[2], max(x.shape[2], 1))
    reason = None
    if time_mesh("short_convolution", x.shape[1]) is not None:
        reason = "the kernel needs whole rows, and mesh.sequence spreads them"
    elif rest:
        reason = f"the kernel needs whole heads, and {x.shape[2] // own.shape[2]} devices have parts of {heads}"
    if choose_short_convolution(backend, own, kernel, own_heads or None, reason) != "pallas":
        return None
    run = functools.partial(ops.short_convolution, activation=activation, heads=own_heads or None, backend="pallas")
    if mesh is None or mesh.size == 1:
        return run(x, kernel, bias, initial_state, segment_ids=segment_ids)
    if initial_state is None:
        initial_state = jnp.zeros_like(x, shape=(x.shape[0], kernel.shape[0] - 1, x.shape[2]))
    arguments = x, kernel, bias, initial_state, segment_ids
    all_axes = axes, (None, channels), (channels,), ("batch", None, channels), TIME
    local = lambda *given: run(*given[:-1], segment_ids=given[-1])  # noqa: E731
    return on_shards(mesh, local, (0, 3), arguments, all_axes)


def gated_rms_norm(
    x: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    skipped: jax.Array | None = None,
    skip: jax.Array | None = None,
    *,
    channels: str | None,
    heads: int = 1,
    backend: str = "auto",
    **options: Any,
) -> jax.Array | None:
    """``ops.gated_rms_norm`` as a kernel, on each device's part, since the compiler cannot split it; or None where that
    does not run and XLA should fuse the operation's parts with what is around them. ``channels`` is the logical axis of
    D."""
    mesh, axes = sharding.mesh_in_use(), (*TIME, channels)
    own = jax.ShapeDtypeStruct(x.shape if mesh is None else sharding.shard_shape(axes, x.shape, mesh), x.dtype)
    own_heads, rest = divmod(heads * own.shape[2], max(x.shape[2], 1))
    devices = x.shape[2] // max(own.shape[2], 1)
    reason = f"the kernel needs whole heads, and {devices} devices have parts of {heads}" if rest else None
    if choose_gated_norm(backend, own, x.shape[2] // heads, reason) != "pallas":
        return None
    arguments = x, gate, scale, skipped, skip
    run = lambda *given: ops.gated_rms_norm(*given, heads=own_heads, backend="pallas", **options)  # noqa: E731
    if mesh is None or mesh.size == 1:
        return run(*arguments)
    of_scale = (channels,) if heads == 1 else (None,)
    return on_shards(mesh, run, 0, arguments, (axes, axes, of_scale, axes, (channels,)))


def parameter_product(equation: str, x: jax.Array, parameter: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """``ops.dtypes.parameter_product``, whose gradient devices sum in the dtype that ``parallel.gradient_dtype`` names."""
    wide = sharding.choices_in_use().gradient_dtype == "float32"
    return dtypes.parameter_product(equation, x, parameter, dtype, wide_gradient=wide)


def _runner(operation: str, length: int, heads: str | None) -> recurrence.Runner:
    mesh = time_mesh(operation, length)
    return recurrence.WHOLE if mesh is None else Spread(mesh, heads, sharding.choices_in_use().exchange)


def _of_last_shard(x: jax.Array) -> jax.Array:
    """The last shard's value on every shard."""
    is_last = lax.axis_index(AXIS) == lax.axis_size(AXIS) - 1
    return lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), AXIS)
