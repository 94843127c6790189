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

import contextlib
import functools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common
from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

WINDOW, CUDNN_WIDTH, STATES = 1024, 128, 16
# What is not compared with anything, and the options of operations.
ALONE = ("selective_scan", "rg_lru", "short_convolution", "gated_rms_norm")
OPTIONS = {
    "gated_rms_norm": {"epsilon": 1e-6, "norm_before_gate": True},
    "sliding_window_attention": {"window": WINDOW},
}
OPERATIONS = (
    *("linear_attention", "linear_attention_scalar", "linear_attention_channel"),
    *("delta_rule", "delta_rule_scalar", "delta_rule_channel", "linear_recurrence"),
    *(*ALONE, "sliding_window_attention"),
)

_OPERATIONS = flags.DEFINE_list("operations", list(OPERATIONS), "Which operations to time.")
_SHAPES = flags.DEFINE_list(
    "shapes", ["1x8192x96x128", "2x16384x16x128", "4x2048x16x128", "4x4096x64x128", "8x2048x32x256"], "BxTxHxD."
)
_BACKEND = flags.DEFINE_enum("backend", "pallas", ["pallas", "chunked"], "chunked: without kernels, on any device.")
_AGAINST = flags.DEFINE_string("against", None, "The Python of an environment with flash-linear-attention.")
_CALLS = flags.DEFINE_integer("calls", 10, "Calls per round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds, in turn, after one warm-up round.", lower_bound=1)
common.define_json()


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
    common.write(result)


def _row(name: str, shape: str, direction: str) -> dict[str, Any]:
    sizes = tuple(map(int, shape.split("x")))
    call = _ours(name, sizes, direction)
    row: dict[str, Any] = {"operation": name, "shape": shape, "direction": direction}
    row["device_ms"] = _device_ms(call)
    with contextlib.ExitStack() as stack:
        theirs = None  # a round of the other library: milliseconds by the clock and by the device
        if name == "sliding_window_attention":
            if _BACKEND.value == "pallas" and sizes[3] <= CUDNN_WIDTH:
                theirs, row["against"] = _cudnn(sizes, direction), {"library": "cuDNN"}
        elif _AGAINST.value and name not in ALONE:
            options = {"shape": shape, "direction": direction, "calls": _CALLS.value}
            worker = stack.enter_context(common.Worker(_AGAINST.value, name, "fla_worker.py", **options))
            row["against"] = {"library": f"flash-linear-attention {worker.told['version']}"}
            theirs = functools.partial(_worker_ms, worker)
        parts = {"ours": functools.partial(_clock_ms, call), "theirs": theirs}
        rounds = common.alternate({name: go for name, go in parts.items() if go}, _ROUNDS.value)
    row["ms"] = statistics.median(rounds["ours"])
    device = "-" if row["device_ms"] is None else f"{row['device_ms']:.3f}"
    line = f"{name:26} {shape:16} {direction:9} {row['ms']:9.3f} {device:>9}"
    if theirs is not None:
        row["against"]["ms"], row["against"]["device_ms"] = map(statistics.median, zip(*rounds["theirs"], strict=True))
        row["times_as_fast"] = row["against"]["ms"] / row["ms"]
        line += f"   theirs {row['against']['ms']:9.3f} {row['against']['device_ms']:9.3f}   {row['times_as_fast']:.2f}"
    print(line, flush=True)
    return row


def _worker_ms(worker: common.Worker) -> tuple[float, float]:
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
    import cases

    from jaxlinear import ops
    from jaxlinear.launching import device_check

    batch, length, heads, width = shape
    options = {"head_width": width} if name == "short_convolution" else OPTIONS.get(name, {})
    call = cases.case(name, batch, length, heads, STATES if name == "selective_scan" else width, width, **options)
    run = device_check.outputs_of(
        call, _BACKEND.value if _BACKEND.value == "pallas" else ops.SPECS[call.operation].plain
    )
    return _calls(lambda inputs: run(inputs)[0], cases.values(call), direction)


def _cudnn(shape: tuple[int, ...], direction: str) -> Callable[[], tuple[float, float]]:
    """cuDNN's attention with the same window: a function that returns milliseconds by the clock and by the device."""
    import cases
    import jax

    options = {"is_causal": True, "local_window_size": (WINDOW - 1, 0), "implementation": "cudnn"}
    batch, length, heads, width = shape
    inputs = cases.values(cases.case("sliding_window_attention", batch, length, heads, width, width, window=WINDOW))
    run = lambda inputs: jax.nn.dot_product_attention(*inputs.values(), **options)  # noqa: E731
    call = _calls(run, inputs, direction)
    device_ms = _device_ms(call)
    assert device_ms is not None
    return lambda: (_clock_ms(call), device_ms)


def _calls(run: Callable, inputs: dict[str, Any], direction: str) -> Callable[[], None]:
    """A function that makes ``_CALLS`` calls of ``run``, or of it and its gradients, and waits for them."""
    import jax

    from jaxlinear.launching import device_check

    given = (inputs,) if direction == "forward" else (inputs, jax.jit(run)(inputs))
    compiled = jax.jit(run if direction == "forward" else device_check.with_gradients(run)).lower(*given).compile()

    def call() -> None:
        for _ in range(_CALLS.value):
            found = compiled(*given)
        jax.block_until_ready(found)

    return call


if __name__ == "__main__":
    cli.run(main)
