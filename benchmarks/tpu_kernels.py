"""Static schedules of the TPU kernels: cycles, bytes, and the time that each implies. No TPU is needed.

    python benchmarks/tpu_kernels.py [--topology=v5e:2x2] [--batch=4 --length=4096 --width=2560] [--json=FILE]
    python benchmarks/tpu_kernels.py --against=RG/bin/python     # and the recurrentgemma package's (recurrentgemma_scan.py)
    python benchmarks/tpu_kernels.py --tune                      # cycles of the scan by block size

The script needs the compiler for TPU (pip install 'jaxlinear[aot]') and compiles every program in its own process. Each has
a row:

    cycles/token   bundles of the schedule x trips of its loops, over B * T
    compute        the time of the cycles at the chip's clock rate
    memory         the time of the bytes that the program's instructions read and write, at the bandwidth of its HBM
    bound          the time of the bytes that must be moved: every input read once, every output written once
    ratio          the larger of compute and memory, over the bound
    relayouts      arrays that are copied or transposed by themselves

compute and memory are lower bounds on the time, not timings. Arrays should be larger than VMEM (128 MiB on v5e), or XLA may
keep them there. "gradient" is the forward and the backward pass together.
"""

import json
import pathlib
import sys

import schedules
from absl import flags

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "v5e, v5p, v6e or tpu7x, and the shape of the slice.")
_BATCH = flags.DEFINE_integer("batch", 4, "B.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 4096, "T.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 2560, "D.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of a and x.")
_BACKENDS = flags.DEFINE_list("backends", ["pallas", "associative"], "Which of our backends.")
_AGAINST = flags.DEFINE_string("against", None, "The Python of an environment with the recurrentgemma package.")
_TUNE = flags.DEFINE_bool("tune", False, "Instead, print cycles of the scan by block size.")
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: compile this backend and direction; print a report.")
_BLOCK = flags.DEFINE_list("block", None, "Internal: time, width and rows of the scan's block.")

DIRECTIONS = ("forward", "gradient")


def main() -> None:
    if _WORKER.value:
        print(json.dumps(_compile(*_WORKER.value.split(","))))
        return
    result = {"topology": _TOPOLOGY.value, "shape": [_BATCH.value, _LENGTH.value, _WIDTH.value], "dtype": _DTYPE.value}
    result["rows"] = _tuning() if _TUNE.value else _comparison()
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _comparison() -> list[dict]:
    schedules.print_columns("scan")
    rows = []
    for direction in DIRECTIONS:
        for name in (*_BACKENDS.value, *(["recurrentgemma"] if _AGAINST.value else [])):
            report = _recurrentgemma(direction) if name == "recurrentgemma" else _worker(name, direction)
            tokens = _BATCH.value * _LENGTH.value
            rows.append(schedules.row(name, direction, report, tokens, _must_move(direction), _TOPOLOGY.value))
    return rows


def _must_move(direction: str) -> int:
    """Bytes of a, x and h; in the backward pass also of a, h and dh again, da and dx. States are negligible."""
    size = 2 if _DTYPE.value == "bfloat16" else 4
    return size * _BATCH.value * _LENGTH.value * _WIDTH.value * (3 if direction == "forward" else 8)


def _tuning() -> list[dict]:
    rows = []
    for time in (256, 512, 1024):
        for width in (256, 512, 1024):
            for steps in (16, 32):
                if time * width > 512 * 512:
                    continue  # two copies of the gradient's blocks would not fit into a kernel's 16 MiB of VMEM
                block = {"time": time, "width": width, "rows": steps}
                reports = {d: _worker("pallas", d, f"--block={time},{width},{steps}") for d in DIRECTIONS}
                rows.append({**block, **{d: report["kernels"] for d, report in reports.items()}})
                cycles = [
                    sum(report["kernels"].values()) / (_BATCH.value * _LENGTH.value) for report in reports.values()
                ]
                print(f"time {time:5} width {width:5} rows {steps:3}: cycles a token {cycles[0]:.2f}, {cycles[1]:.2f}")
    return rows


def _worker(backend: str, direction: str, *more: str) -> dict:
    names = ("topology", "batch", "length", "width", "dtype")
    options = [f"--{name}={flags.FLAGS[name].value}" for name in names]
    return schedules.in_process([sys.executable, __file__, f"--worker={backend},{direction}", *options, *more])


def _recurrentgemma(direction: str) -> dict:
    script = pathlib.Path(__file__).with_name("recurrentgemma_scan.py")
    shape = [str(flag.value) for flag in (_BATCH, _LENGTH, _WIDTH)]
    return schedules.in_process([_AGAINST.value, str(script), _TOPOLOGY.value, direction, *shape, _DTYPE.value])


def _compile(backend: str, direction: str) -> dict:
    directory = schedules.begin()
    import jax

    from jaxlinear.ops import backends, linear_recurrence
    from jaxlinear.pallas.scan import blocks

    shape = _BATCH.value, _LENGTH.value, _WIDTH.value
    x, state = jax.ShapeDtypeStruct(shape, _DTYPE.value), jax.ShapeDtypeStruct((shape[0], shape[2]), "float32")
    kind = schedules.device(_TOPOLOGY.value).device_kind
    if _BLOCK.value:
        blocks.TPU[kind] = blocks.Block(*map(int, _BLOCK.value))

    def forward(a, x, state):
        with backends.use_platform("tpu", kind):
            return linear_recurrence(a, x, state, backend=backend)

    def gradient(a, x, state, cotangents):
        outputs, pullback = jax.vjp(forward, a, x, state)
        with backends.use_platform("tpu", kind):
            return outputs, pullback(cotangents)

    function = forward if direction == "forward" else gradient
    cotangents = () if direction == "forward" else ((x, state),)
    compiled = schedules.compile_for(_TOPOLOGY.value, function, x, x, state, *cotangents)
    return schedules.report(directory, compiled, _TOPOLOGY.value)


if __name__ == "__main__":
    from jaxlinear import cli

    cli.run(main)
