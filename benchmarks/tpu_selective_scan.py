"""Static schedules and bytes of the selective scan for TPU, as a kernel and in blocks of time. No TPU is needed.

    python benchmarks/tpu_selective_scan.py [--topology=v5e:2x2] [--batch=4 --length=2048 --width=4096 --states=16]
        [--of_keys] [--packed] [--json=FILE]

The script needs the compiler for TPU (pip install 'jaxlinear[aot]'). x is bfloat16 and all else float32, as in Mamba. The
columns are those of ``tpu_kernels.py``; ``bound`` is the time of the bytes of x, dt and y and, for the gradient, also of x
and dt again, dy, dx and ddt. In the kernel, the first block of channels does some work for a whole block of time; this is
counted for every block of channels, which at D = 4,096 and N = 16 is a third of the cycles of the forward pass and a sixth
of the gradient's. "gradient" is both passes.
"""

import json
import pathlib
import sys

import schedules
from absl import flags

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "v5e, v5p, v6e or tpu7x, and the shape of the slice.")
_BATCH = flags.DEFINE_integer("batch", 4, "B.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 2048, "T.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 4096, "D.", lower_bound=1)
_STATES = flags.DEFINE_integer("states", 16, "N.", lower_bound=1)
_OF_KEYS = flags.DEFINE_bool("of_keys", False, "The transition 1 - dt B^2, as in Longhorn.")
_PACKED = flags.DEFINE_bool("packed", False, "With packed documents.")
_BACKENDS = flags.DEFINE_list("backends", ["pallas", "chunked"], "Which of our backends.")
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: compile this backend and direction; print a report.")

_SHAPE = (_TOPOLOGY, _BATCH, _LENGTH, _WIDTH, _STATES, _OF_KEYS, _PACKED)


def main() -> None:
    if _WORKER.value:
        print(json.dumps(_compile(*_WORKER.value.split(","))))
        return
    schedules.print_columns("selective scan")
    rows = [_row(name, direction) for direction in ("forward", "gradient") for name in _BACKENDS.value]
    if _JSON.value:
        result = {flag.name: flag.value for flag in _SHAPE} | {"rows": rows}
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _row(name: str, direction: str) -> dict:
    options = [f"--{flag.name}={str(flag.value).lower()}" for flag in _SHAPE]
    report = schedules.in_process([sys.executable, __file__, f"--worker={name},{direction}", *options])
    tokens = _BATCH.value * _LENGTH.value
    must_move = tokens * _WIDTH.value * (8 if direction == "forward" else 22)
    return schedules.row(name, direction, report, tokens, must_move, _TOPOLOGY.value)


def _compile(backend: str, direction: str) -> dict:
    directory = schedules.begin()
    import jax

    from jaxlinear.ops import backends, selective_scan

    kind = schedules.device(_TOPOLOGY.value).device_kind
    batch, length, width, states = (flag.value for flag in (_BATCH, _LENGTH, _WIDTH, _STATES))

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    x, state = array(batch, length, width, dtype="bfloat16"), array(batch, width, states)
    rates = None if _OF_KEYS.value else array(width, states)
    ids = array(batch, length, dtype="int32") if _PACKED.value else None
    inputs = x, array(*x.shape), rates, array(batch, length, states), array(batch, length, states), state

    def forward(ids, *inputs):
        with backends.use_platform("tpu", kind):
            return selective_scan(*inputs, segment_ids=ids, backend=backend)

    def gradient(ids, cotangents, *inputs):
        outputs, pullback = jax.vjp(lambda *inputs: forward(ids, *inputs), *inputs)
        with backends.use_platform("tpu", kind):
            return outputs, pullback(cotangents)

    function, more = (forward, ()) if direction == "forward" else (gradient, ((x, state),))
    compiled = schedules.compile_for(_TOPOLOGY.value, function, ids, *more, *inputs)
    return schedules.report(directory, compiled, _TOPOLOGY.value)


if __name__ == "__main__":
    from jaxlinear import cli

    cli.run(main)
