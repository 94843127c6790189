"""Times the kernels on a GPU, along with those of flash-linear-attention at the same shapes in one run.

    python benchmarks/gpu_kernels.py [--against=FLA/bin/python] [--operations=...] [--json=FILE]    # FLA: see fla_worker.py

Shapes are B x T x H x D with K = V = D, and arrays are bfloat16. For each operation and shape it prints milliseconds
per call, forward and forward with backward, by the clock (after waiting for the device) and by the device's own record
of its kernels. With ``--against`` the two libraries take turns, and it also prints how many times as fast ours is. The
linear recurrence has H * D channels. So has what is not compared with anything: the selective scan, with 16 states per
channel and float32 for all but x; the RG-LRU, with a block of W per head; the short convolution, whose heads get unit
length; and the RMSNorm over each head with its gate. Attention with a window of 1,024 is compared with cuDNN's, through
JAX, up to 128 channels per head; cuDNN's does not support packed documents.

``--backend=chunked`` times the code that runs without kernels, on any device, so the program can be tried without a GPU.
"""

import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import flags
from alternating import Worker

from jaxlinear import cli
from jaxlinear.errors import UserError

OPERATIONS = {
    "linear_attention": ("linear_attention", "none"),
    "linear_attention_scalar": ("linear_attention", "scalar"),
    "linear_attention_channel": ("linear_attention", "channel"),
    "delta_rule": ("delta_rule", "none"),
    "delta_rule_scalar": ("delta_rule", "scalar"),
    "delta_rule_channel": ("delta_rule", "channel"),
    "linear_recurrence": ("linear_recurrence", "channel"),
    "selective_scan": ("selective_scan", "none"),
    "rg_lru": ("rg_lru", "none"),
    "short_convolution": ("short_convolution", "none"),
    "gated_rms_norm": ("gated_rms_norm", "none"),
    "sliding_window_attention": ("sliding_window_attention", "none"),
}
ALONE = {"selective_scan", "rg_lru", "short_convolution", "gated_rms_norm"}
WITHOUT_KERNELS = {
    "linear_recurrence": "associative",
    **dict.fromkeys(("rg_lru", "short_convolution", "gated_rms_norm"), "separate"),
}
STATELESS = {"sliding_window_attention", "gated_rms_norm"}  # the others also return a state
WINDOW, CUDNN_WIDTH, STATES, TAPS = 1024, 128, 16, 4

_OPERATIONS = flags.DEFINE_list("operations", list(OPERATIONS), "Which operations to time.")
_SHAPES = flags.DEFINE_list(
    "shapes", ["1x8192x96x128", "2x16384x16x128", "4x2048x16x128", "4x4096x64x128", "8x2048x32x256"], "BxTxHxD."
)
_BACKEND = flags.DEFINE_enum("backend", "pallas", ["pallas", "chunked"], "chunked: without kernels, on any device.")
_AGAINST = flags.DEFINE_string("against", None, "The Python of an environment with flash-linear-attention.")
_CALLS = flags.DEFINE_integer("calls", 10, "Calls per round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds, in turn, after one warm-up round.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other library needs its share of the memory
    import jax

    if unknown := [name for name in _OPERATIONS.value if name not in OPERATIONS]:
        raise UserError(f"--operations={unknown[0]} is not one of {', '.join(OPERATIONS)}")
    if _BACKEND.value == "pallas" and jax.default_backend() != "gpu":
        raise UserError("there is no GPU to time kernels on; --backend=chunked runs without them")
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "backend": _BACKEND.value, "rows": []}
    print(f"{result['device']}\n{'ms per call':26} {'shape':16} {'direction':9} {'clock':>9} {'device':>9}", flush=True)
    for name in _OPERATIONS.value:
        for shape in _SHAPES.value:
            for direction in ("forward", "both"):
                result["rows"].append(_row(name, shape, direction))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _row(name: str, shape: str, direction: str) -> dict[str, Any]:
    sizes = tuple(map(int, shape.split("x")))
    call = _ours(name, sizes, direction)
    row: dict[str, Any] = {"operation": name, "shape": shape, "direction": direction}
    row["ms"], row["device_ms"] = [], _device_ms(call)
    worker, theirs = None, None  # a round of the other library: milliseconds by the clock and by the device
    if name == "sliding_window_attention":
        if _BACKEND.value == "pallas" and sizes[3] <= CUDNN_WIDTH:
            theirs = _cudnn(sizes, direction)
            row["against"] = {"library": "cuDNN"}
    elif _AGAINST.value and name not in ALONE:
        options = {"shape": shape, "direction": direction, "calls": _CALLS.value}
        worker = Worker(_AGAINST.value, name, "fla_worker.py", **options)
        row["against"] = {"library": f"flash-linear-attention {worker.told['version']}"}
        theirs = functools.partial(_worker_ms, worker)
    rounds = []
    try:
        for _ in range(_ROUNDS.value + 1):
            row["ms"].append(_clock_ms(call))
            if theirs is not None:
                rounds.append(theirs())
    finally:
        if worker is not None:
            worker.close()
    row["ms"] = statistics.median(row["ms"][1:])
    device = "-" if row["device_ms"] is None else f"{row['device_ms']:.3f}"
    line = f"{name:26} {shape:16} {direction:9} {row['ms']:9.3f} {device:>9}"
    if theirs is not None:
        row["against"]["ms"], row["against"]["device_ms"] = map(statistics.median, zip(*rounds[1:], strict=True))
        row["times_as_fast"] = row["against"]["ms"] / row["ms"]
        line += f"   theirs {row['against']['ms']:9.3f} {row['against']['device_ms']:9.3f}   {row['times_as_fast']:.2f}"
    print(line, flush=True)
    return row


def _worker_ms(worker: Worker) -> tuple[float, float]:
    told = worker.round()
    return 1000 * told["seconds"] / told["calls"], 1000 * told["device_seconds"] / told["calls"]


def _clock_ms(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin) / _CALLS.value


def _device_ms(call: Callable[[], None]) -> float | None:
    """How long the GPU's kernels took per call, from the profile of a round; None if there is no GPU."""
    import jax

    call()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            call()
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        nanoseconds = [
            event.duration_ns
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return sum(nanoseconds) / 1e6 / _CALLS.value if nanoseconds else None


def _ours(name: str, shape: tuple[int, ...], direction: str) -> Callable[[], None]:
    """A function that makes ``_CALLS`` calls and waits for them."""
    import jax
    import jax.numpy as jnp

    from jaxlinear import ops

    operation, decay = OPERATIONS[name]
    batch, length, heads, width = shape
    keys = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda *size: jax.random.normal(next(keys), size, jnp.bfloat16)  # noqa: E731
    q, k, v, d_o = (draw(*shape) for _ in range(4))
    k = k / jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True).astype(k.dtype)
    beta = jax.nn.sigmoid(draw(*shape[:3]))
    log_decay = jax.nn.log_sigmoid(draw(*(shape if decay == "channel" else shape[:3])).astype(jnp.float32)) / 16
    if decay == "channel":
        log_decay = log_decay.astype(jnp.bfloat16)
    backend = _BACKEND.value if _BACKEND.value == "pallas" else WITHOUT_KERNELS.get(operation, _BACKEND.value)
    options = {"window": WINDOW} if operation == "sliding_window_attention" else {}
    options |= {"head_width": width} if operation == "short_convolution" else {}
    options |= {"epsilon": 1e-6, "norm_before_gate": True} if operation == "gated_rms_norm" else {}
    run = functools.partial(getattr(ops, operation), backend=backend, **options)
    inputs: tuple[Any, ...] = (q, k, v, beta) if operation == "delta_rule" else (q, k, v)
    if operation == "linear_recurrence":
        flat = (batch, length, heads * width)
        inputs, d_o = (jnp.exp(log_decay).reshape(flat), v.reshape(flat)), d_o.reshape(flat)
    elif operation in ALONE:
        flat = (batch, length, heads * width)
        inputs, d_o = _inputs(operation, q.reshape(flat), v.reshape(flat), heads, draw), d_o.reshape(flat)
    elif decay != "none":
        inputs = *inputs, log_decay

    outputs = run if operation in STATELESS else lambda *x: run(*x)[0]
    return _calls(outputs, inputs, d_o, direction)


def _inputs(operation: str, q: Any, v: Any, heads: int, draw: Callable) -> tuple[Any, ...]:
    """Of an operation that is timed alone, from q and v as ``[B, T, H * D]``."""
    import jax
    import jax.numpy as jnp

    batch, length, channels = v.shape
    if operation == "selective_scan":
        dt = jax.nn.softplus(q.astype(jnp.float32) - 4)
        rates = -jnp.broadcast_to(jnp.arange(1, STATES + 1, dtype=jnp.float32), (channels, STATES))
        written, read = (draw(batch, length, STATES).astype(jnp.float32) for _ in range(2))
        return v, dt, rates, written, read
    if operation == "gated_rms_norm":
        return v, q, jnp.ones(channels // heads)
    if operation == "short_convolution":
        return v, draw(TAPS, channels).astype(jnp.float32)
    block = channels // heads
    of_a, of_x = (draw(heads, block, block).astype(jnp.float32) / block**0.5 for _ in range(2))
    bias, first = jnp.zeros(channels), jnp.arange(length)[None] == jnp.zeros((batch, 1))
    return v, of_a, bias, of_x, bias, jnp.full(channels, -0.1), first


def _cudnn(shape: tuple[int, ...], direction: str) -> Callable[[], tuple[float, float]]:
    """cuDNN's attention with the same window: a function that returns milliseconds by the clock and by the device."""
    import jax

    q, k, v, d_o = (jax.random.normal(jax.random.key(n), shape, "bfloat16") for n in range(4))
    options = {"is_causal": True, "local_window_size": (WINDOW - 1, 0), "implementation": "cudnn"}
    call = _calls(functools.partial(jax.nn.dot_product_attention, **options), (q, k, v), d_o, direction)
    device_ms = _device_ms(call)
    assert device_ms is not None
    return lambda: (_clock_ms(call), device_ms)


def _calls(run: Callable, inputs: tuple, d_o: Any, direction: str) -> Callable[[], None]:
    """A function that makes ``_CALLS`` calls of ``run``, or of it and its gradients, and waits for them."""
    import jax

    def both(*inputs):
        o, pullback = jax.vjp(run, *inputs)
        return o, pullback(d_o.astype(o.dtype))

    compiled = jax.jit(both if direction == "both" else run).lower(*inputs).compile()

    def call() -> None:
        for _ in range(_CALLS.value):
            found = compiled(*inputs)
        jax.block_until_ready(found)

    return call


if __name__ == "__main__":
    cli.run(main)
