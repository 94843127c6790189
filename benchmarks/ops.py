"""Time and peak memory of every operation and backend, forward and with gradients, by the length of a sequence.

    python benchmarks/ops.py [--lengths=256,1024,4096,16384,65536] [--tokens=65536] [--heads=4 --width=64] [--json=FILE]
    python benchmarks/ops.py --ratio_length=4096        # chunked against recurrent at one shape, in turn

B * T is the same at every length, so a perfectly linear operation takes the same time per token everywhere. Softmax
attention of the same width is measured too, and the first length at which each operation is faster than attention is
printed. The lengths of an operation are measured in turn, each by the second of two runs. The ``recurrent`` backend keeps a
state for every token in its backward pass, so it is measured on --recurrent_tokens only; the ratio of chunked to recurrent
is measured at one shape for both, in turn.

Memory is XLA's own figure for the compiled program: its temporaries and outputs, without its inputs.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_OPS = flags.DEFINE_list("ops", None, "Which operations to measure, by name; all by default.")
_LENGTHS = flags.DEFINE_list("lengths", ["256", "1024", "4096", "16384", "65536"], "T.")
_TOKENS = flags.DEFINE_integer("tokens", 65_536, "B * T.", lower_bound=1)
_RECURRENT_TOKENS = flags.DEFINE_integer("recurrent_tokens", 8_192, "B * T of the recurrent backends.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 4, "H.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 64, "K = V; the diagonal recurrence has H * K channels.", lower_bound=1)
_RATIO_LENGTH = flags.DEFINE_integer("ratio_length", None, "Only the ratio of chunked to recurrent, at B=1 and this T.")
_WINDOW = flags.DEFINE_integer("window", 512, "Window of sliding_window_attention.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed runs, after one warm-up run.", lower_bound=1)
common.define_json()

# The backends of each operation.
CASES = {
    "linear_recurrence": ("recurrent", "associative"),
    "linear_attention": ("recurrent", "chunked"),
    "linear_attention_constant": ("chunked",),
    "linear_attention_scalar": ("chunked",),
    "linear_attention_channel": ("recurrent", "chunked"),
    "delta_rule": ("recurrent", "chunked"),
    "delta_rule_scalar": ("chunked",),
    "delta_rule_channel": ("recurrent", "chunked"),
    "sliding_window_attention": ("chunked",),
    "attention": ("chunked",),
}


def main() -> None:
    names = list(CASES) if _OPS.value is None else _OPS.value
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--ops={unknown[0]} is not one of {', '.join(CASES)}")
    result: dict[str, Any] = {"load_average": os.getloadavg()[0], "heads": _HEADS.value, "width": _WIDTH.value}
    if _RATIO_LENGTH.value:
        result["ratios"] = _ratios(names, _RATIO_LENGTH.value)
    else:
        result["rows"] = _table(names, [int(length) for length in _LENGTHS.value])
    common.write(result)


def _table(names: list[str], lengths: list[int]) -> list[dict[str, Any]]:
    print(
        f"{'operation':27} {'backend':12} {'T':>6} {'B':>4}   us/token: {'forward':>8} {'+backward':>9}   MiB: forward"
    )
    rows = []
    for name in names:
        for backend in CASES[name]:
            total = _RECURRENT_TOKENS.value if backend == "recurrent" else _TOKENS.value
            parts, memory = {}, {}
            for length in (length for length in lengths if length <= total):
                for pas in ("forward", "gradient"):
                    parts[length, pas], memory[length, pas] = _case(name, backend, total // length, length, pas)
            seconds = common.alternate(parts, _ROUNDS.value)
            for length in dict.fromkeys(length for length, _ in parts):
                row = {"operation": name, "backend": backend, "length": length, "batch": total // length}
                for pas in ("forward", "gradient"):
                    row[f"{pas}_us_per_token"] = 1e6 * statistics.median(seconds[length, pas]) / total
                    row[f"{pas}_bytes"] = memory[length, pas]
                rows.append(row)
                print(
                    f"{name:27} {backend:12} {length:6} {row['batch']:4} {'':11} {row['forward_us_per_token']:8.3f} "
                    f"{row['gradient_us_per_token']:9.3f}   {row['forward_bytes'] / 2**20:8.1f} "
                    f"+backward {row['gradient_bytes'] / 2**20:8.1f}",
                    flush=True,
                )
    _crossings(rows)
    return rows


def _crossings(rows: list[dict[str, Any]]) -> None:
    """The first measured length at which each operation, with gradients, is faster than softmax attention."""
    attention = {row["length"]: row["gradient_us_per_token"] for row in rows if row["operation"] == "attention"}
    for name, backend in {(row["operation"], row["backend"]): None for row in rows if row["operation"] != "attention"}:
        own = {
            r["length"]: r["gradient_us_per_token"] for r in rows if (r["operation"], r["backend"]) == (name, backend)
        }
        faster = [length for length in sorted(own) if length in attention and own[length] < attention[length]]
        if attention:
            at = f"from T = {faster[0]:,} on" if faster else "at no measured length"
            print(f"{name} ({backend}) is faster than attention {at}")


def _ratios(names: list[str], length: int) -> dict[str, Any]:
    ratios = {}
    for name in names:
        if not name.startswith(("linear_attention", "delta_rule")):
            continue
        parts = {backend: _case(name, backend, 1, length, "gradient")[0] for backend in ("recurrent", "chunked")}
        seconds = common.alternate(parts, _ROUNDS.value)
        each = [slow / fast for slow, fast in zip(seconds["recurrent"], seconds["chunked"], strict=True)]
        ratios[name] = {"ratio": statistics.median(each), "ratios": each, "seconds": seconds}
        print(f"{name:27} T={length} B=1: chunked is {ratios[name]['ratio']:.1f} times as fast, forward + backward")
    return ratios


def _case(name: str, backend: str, batch: int, length: int, pas: str) -> tuple[Callable[[], float], int]:
    """A function that returns the seconds of one run, and the bytes that the program needs."""
    import cases
    import jax

    from jaxlinear.launching import device_check

    options = {"window": _WINDOW.value} if name == "sliding_window_attention" else {}
    shape = batch, length, _HEADS.value, _WIDTH.value, _WIDTH.value
    call = cases.case("causal_attention" if name == "attention" else name, *shape, dtype="float32", **options)
    inputs, run = cases.values(call), device_check.outputs_of(call, backend)

    def output(inputs: dict) -> Any:
        return run(inputs)[0]

    def gradient(inputs: dict) -> Any:
        o, pullback = jax.vjp(output, inputs)
        return pullback(o)

    compiled = jax.jit(output if pas == "forward" else gradient).lower(inputs).compile()
    memory = compiled.memory_analysis()

    def go() -> float:
        # The previous program used the memory differently and freed it: the first run of a turn allocates it again.
        jax.block_until_ready(compiled(inputs))
        begin = time.perf_counter()
        jax.block_until_ready(compiled(inputs))
        return time.perf_counter() - begin

    return go, memory.temp_size_in_bytes + memory.output_size_in_bytes


if __name__ == "__main__":
    cli.run(main)
