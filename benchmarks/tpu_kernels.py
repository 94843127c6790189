"""Static schedules of the TPU kernels of diagonal recurrences: cycles, bytes, and the time that each implies.

    python benchmarks/tpu_kernels.py [--topology=v5e:2x2] [--batch=4 --length=4096 --width=2560] [--json=FILE]
    python benchmarks/tpu_kernels.py --against=RG/bin/python     # and the recurrentgemma package's (recurrentgemma_scan.py)
    python benchmarks/tpu_kernels.py --tune                      # cycles of the scan by block size
    python benchmarks/tpu_kernels.py --operation=selective_scan --dtype=bfloat16 --length=2048 --width=4096
        [--states=16] [--of_keys] [--packed]

No TPU is needed, but the compiler for it (pip install 'jaxlinear[aot]'). Every program has its own process, and a row:

    cycles/token   bundles of the schedule x trips of its loops, over B * T
    compute        the time of the cycles at the chip's clock rate
    memory         the time of the bytes that the program's instructions read and write, at the bandwidth of its HBM
    bound          the time of the bytes that must be moved: every input read once, every output written once
    ratio          the larger of compute and memory, over the bound
    relayouts      arrays that are copied or transposed by themselves

compute and memory are lower bounds on the time, not timings. Arrays should be larger than VMEM (128 MiB on v5e), or XLA may
keep them there. "gradient" is the forward and the backward pass together.

In the selective scan all arrays but x are float32, as in Mamba. In its kernel the first block of channels does some work
for a whole block of time; this is counted for every block of channels, which at D = 4,096 and N = 16 is a third of the
cycles of the forward pass and a sixth of the gradient's.
"""

import itertools
import json
import math
import pathlib
import subprocess

import common
import schedules
from absl import flags

from jaxlinear import cli
from jaxlinear.errors import RunError

PLAIN = {"linear_recurrence": "associative", "selective_scan": "chunked"}  # the form without a kernel

_OPERATION = flags.DEFINE_enum("operation", "linear_recurrence", list(PLAIN), "Of jaxlinear.ops.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "v5e, v5p, v6e or tpu7x, and the shape of the slice.")
_BATCH = flags.DEFINE_integer("batch", 4, "B.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 4096, "T.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 2560, "D.", lower_bound=1)
_STATES = flags.DEFINE_integer("states", 16, "N of the selective scan.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of a and x.")
_OF_KEYS = flags.DEFINE_bool("of_keys", False, "The transition 1 - dt B^2 of the selective scan, as in Longhorn.")
_PACKED = flags.DEFINE_bool("packed", False, "With packed documents.")
_BACKENDS = flags.DEFINE_list("backends", None, "Which of our backends; by default pallas and the one without kernels.")
_AGAINST = flags.DEFINE_string("against", None, "The Python of an environment with the recurrentgemma package.")
_TUNE = flags.DEFINE_bool("tune", False, "Instead, print cycles of the scan by block size.")
common.define_json()

_RECORDED = _OPERATION, _TOPOLOGY, _BATCH, _LENGTH, _WIDTH, _STATES, _DTYPE, _OF_KEYS, _PACKED
DIRECTIONS = ("forward", "gradient")
_COLUMNS = {"cycles/token": 12, "compute us": 11, "memory us": 10, "bound us": 9, "ratio": 6, "relayouts": 9}


def main() -> None:
    rows = _tuning() if _TUNE.value else _comparison()
    common.write({flag.name: flag.value for flag in _RECORDED} | {"rows": rows})


def _comparison() -> list[dict]:
    print(f"{'':25}", *(f"{name:>{width}}" for name, width in _COLUMNS.items()))
    rows = []
    for direction in DIRECTIONS:
        for backend in _BACKENDS.value or ("pallas", PLAIN[_OPERATION.value]):
            rows.append(_row(backend, direction, schedules.in_process(_compile, backend, direction)))
        if _AGAINST.value:
            rows.append(_row("recurrentgemma", direction, _recurrentgemma(direction)))
    return rows


def _row(name: str, direction: str, report: dict) -> dict:
    """Prints and returns a program's ``report`` with the time of the bytes that it must move; None is for the unknown."""
    bound = 1e6 * _must_move(direction) / schedules.RATES[_TOPOLOGY.value.partition(":")[0]][0]
    found = {"scan": name, "direction": direction, **report, "bound_us": bound}
    found["cycles_a_token"] = report["cycles"] / (_BATCH.value * _LENGTH.value)
    if not math.isnan(report["cycles"]):
        found["ratio"] = max(report["memory_us"], report["compute_us"]) / bound
    else:
        found |= {"ratio": report["memory_us"] / bound, "cycles": None, "compute_us": None, "cycles_a_token": None}
    values = [f"{found[key]:.2f}" if found[key] else "unknown" for key in ("cycles_a_token", "compute_us")]
    values += [f"{found['memory_us']:.1f}", f"{bound:.1f}", f"{found['ratio']:.2f}", f"{len(found['relayouts'])}"]
    cells = (f"{value:>{width}}" for value, width in zip(values, _COLUMNS.values(), strict=True))
    print(f"{name:15} {direction:9}", *cells, flush=True)
    return found


def _must_move(direction: str) -> int:
    """Bytes of a, x and h, or of x, dt and y; in the backward pass also of a and h or x and dt again, of the output's
    gradient, and of both gradients. States are negligible."""
    size = 2 if _DTYPE.value == "bfloat16" else 4
    inputs = 2 * size if _OPERATION.value == "linear_recurrence" else size + 4
    each = inputs + size if direction == "forward" else 3 * inputs + 2 * size
    return each * _BATCH.value * _LENGTH.value * _WIDTH.value


def _tuning() -> list[dict]:
    rows = []
    for time, width, steps in itertools.product((256, 512, 1024), (256, 512, 1024), (16, 32)):
        if time * width > 512 * 512:
            continue  # two copies of the gradient's blocks would not fit into a kernel's 16 MiB of VMEM
        block = time, width, steps
        kernels = {d: schedules.in_process(_compile, "pallas", d, block)["kernels"] for d in DIRECTIONS}
        rows.append({"time": time, "width": width, "rows": steps, **kernels})
        cycles = [sum(each.values()) / (_BATCH.value * _LENGTH.value) for each in kernels.values()]
        print(f"time {time:5} width {width:5} rows {steps:3}: cycles a token {cycles[0]:.2f}, {cycles[1]:.2f}")
    return rows


def _recurrentgemma(direction: str) -> dict:
    script = pathlib.Path(__file__).with_name("recurrentgemma_scan.py")
    shape = [str(flag.value) for flag in (_BATCH, _LENGTH, _WIDTH)]
    command = [_AGAINST.value, str(script), _TOPOLOGY.value, direction, *shape, _DTYPE.value]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _compile(directory: str, backend: str, direction: str, block: tuple[int, int, int] | None = None) -> dict:
    import cases
    import jax

    from jaxlinear.launching import device_check
    from jaxlinear.ops import backends
    from jaxlinear.pallas.scan import blocks

    kind = schedules.device(_TOPOLOGY.value).device_kind
    if block:
        blocks.TPU[kind] = blocks.Block(*block)
    shape = _BATCH.value, _LENGTH.value, 1, _STATES.value, _WIDTH.value
    call = cases.case(_OPERATION.value, *shape, dtype=_DTYPE.value, documents=_PACKED.value)
    if _OF_KEYS.value:
        call = call._replace(arguments=tuple((dict(call.arguments) | {"A": None}).items()))
    run, arrays = device_check.outputs_of(call, backend), call.arrays
    with backends.use_platform("tpu", kind):
        outputs = jax.eval_shape(run, arrays)
        arrays["initial_state"] = outputs[1]
        function = (run, arrays) if direction == "forward" else (device_check.with_gradients(run), arrays, outputs)
        compiled = schedules.compile_for(_TOPOLOGY.value, *function)
    return schedules.report(directory, compiled, _TOPOLOGY.value)


if __name__ == "__main__":
    cli.run(main)
