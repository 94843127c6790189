"""What a layer's mixer costs on a TPU, forward and backward, instruction by instruction. No TPU is needed.

    python benchmarks/tpu_layers.py --model=delta_net_1b3 [--mixer=delta_net] [--topology=v5e:2x4] [--rows=2 --length=8192]
        [--top=20] [--json=FILE]

The script needs the compiler for TPU (pip install 'jaxlinear[aot]'). The mixer is compiled in bfloat16, with packed
documents, on a mesh of all the topology's devices that splits the batch alone. Of each instruction outside loops, and of
all together:

    bytes us      operands and results in HBM, in whole tiles, over its bandwidth; arrays that the compiler keeps in VMEM
                  are free
    cycles us     libtpu's schedule: bundles times trips. Of instructions without one, such as copies, 0
    time us       the longer of the two: a bound, as if no two instructions overlapped

Arrays of 1 MiB or more are rewritten if a program only puts them in another order, gives them other axes, or repeats them.
"""

import itertools
import json
import math
import pathlib
import re

import schedules
from absl import flags

_MODEL = flags.DEFINE_string("model", "delta_net_1b3", "A preset.")
_MIXER = flags.DEFINE_string("mixer", None, "One of the preset's mixers, by default its first.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "v5e, v5p, v6e or tpu7x, and the shape of the slice.")
_ROWS = flags.DEFINE_integer("rows", 2, "B on each device.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 8192, "T.", lower_bound=1)
_TOP = flags.DEFINE_integer("top", 0, "Also list so many of the longest instructions.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
_REWRITES = {"copy", "transpose", "reshape", "broadcast"}
_SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "c64": 8}


def main() -> None:
    directory = schedules.begin()
    text, mixer = _compile()
    bandwidth, clock = schedules.RATES[_TOPOLOGY.value.partition(":")[0]]
    found = instructions(text, schedules.schedules(directory))
    for item in found:
        item |= {"bytes_us": 1e6 * item["bytes"] / bandwidth, "cycles_us": 1e6 * item["cycles"] / clock}
        item["us"] = max(item["bytes_us"], item["cycles_us"])
    rewritten = [item["bytes"] for item in found if item["kind"] in _REWRITES and item["result"] >= 2**20]
    result = {
        **{
            "model": _MODEL.value,
            "mixer": mixer,
            "topology": _TOPOLOGY.value,
            "rows": _ROWS.value,
            "length": _LENGTH.value,
        },
        **{name: sum(item[name] for item in found) for name in ("bytes_us", "cycles_us", "us")},
        **{"rewritten": len(rewritten), "rewritten_us": 1e6 * sum(rewritten) / bandwidth},
    }
    print(f"{'time us':>9} {'bytes us':>9} {'cycles us':>9}")
    for item in sorted(found, key=lambda item: -item["us"])[: _TOP.value]:
        _print(item, f"{item['kind']} {item['name']} {item['operation'][-60:]}")
    _print(result, f"all; {len(rewritten)} arrays rewritten, {result['rewritten_us']:.0f} us of the bytes")
    if _JSON.value:
        text = json.dumps(result | {"instructions": found}, indent=2)
        pathlib.Path(_JSON.value).write_text(text + "\n", encoding="utf-8")


def _print(item: dict, label: str) -> None:
    print(f"{item['us']:9.0f} {item['bytes_us']:9.0f} {item['cycles_us']:9.0f}  {label}")


def instructions(text: str, cycles: dict[str, float]) -> list[dict]:
    """The instructions of a compiled program that take time, outside loops, with their bytes in HBM and their cycles."""
    found, shapes = [], {}
    for line in text[text.index("\nENTRY ") :].splitlines():
        if parts := _INSTRUCTION.match(line):
            name, shape, kind, rest = parts.groups()
            shapes[name] = shape
            if kind in _FREE or kind.endswith(("-start", "-done")):
                continue
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            known, operation = cycles.get(name, _of_its_like(name, kind, cycles)), re.search(r'op_name="([^"]*)"', rest)
            moved = _in_hbm(shape) + sum(_in_hbm(shapes.get(operand, "")) for operand in operands)
            item = {"name": name, "kind": kind, "operation": operation[1] if operation else "", "bytes": moved}
            found.append(item | {"result": _in_hbm(shape), "cycles": 0.0 if math.isnan(known) else known})
    return found


def _of_its_like(name: str, kind: str, cycles: dict[str, float]) -> float:
    """Of a kernel without a schedule, the cycles of the longest of its name: libtpu compiles equal kernels once."""
    if kind != "custom-call":
        return 0.0
    return max((x for other, x in cycles.items() if other.partition(".")[0] == name.partition(".")[0]), default=0.0)


def _in_hbm(shape: str) -> int:
    """Bytes of a shape, or of a tuple of them, but for those that its layout places in VMEM."""
    arrays = (item for item in _ARRAY.findall(shape) if "S(1)" not in item[2] and item[0] in _SIZES)
    return sum(_SIZES[kind] * _elements(sizes, layout) for kind, sizes, layout in arrays)


def _elements(sizes: str, layout: str) -> int:
    """Of an array with this layout, such as ``{2,0,1:T(8,128)(2,1)}``: from the minor axis on, whole tiles of 8 x 128."""
    order, tile = re.match(r"\{([\d,]*)", layout), re.search(r"T\(([\d,]+)\)", layout)
    if not sizes or order is None:
        return math.prod(map(int, filter(None, sizes.split(","))))
    axes = [int(sizes.split(",")[int(axis)]) for axis in order[1].split(",")]
    parts = list(map(int, reversed(tile[1].split(",")))) if tile else []
    return math.prod(-(-size // part) * part for size, part in itertools.zip_longest(axes, parts, fillvalue=1))


def _compile() -> tuple[str, str]:
    """The text of the compiled program, and the mixer's name."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxlinear.config import default
    from jaxlinear.models import ModelConfig, mixers, presets
    from jaxlinear.parallel import mesh as meshes
    from jaxlinear.parallel import sharding, targets

    values = presets.find(_MODEL.value) | {"vocab_size": 512, "dtype": "bfloat16"}
    config = ModelConfig(**values)
    name = _MIXER.value or config.pattern[0]
    devices = targets.find(_TOPOLOGY.value).devices
    mesh = meshes.make_mesh(default().mesh, devices)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: mixers.find(name)(config, rngs=nnx.Rngs(0))))

    def both(parameters, x, ids, d_y):
        layer = lambda parameters, x: nnx.merge(graph, parameters)(x, segment_ids=ids)[0]  # noqa: E731
        y, pullback = jax.vjp(layer, parameters, x)
        return y, pullback(d_y)

    def placed(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    tokens = _ROWS.value * len(devices), _LENGTH.value
    x, ids = placed((*tokens, config.width), jnp.bfloat16, "data"), placed(tokens, jnp.int32, "data")
    parameters = jax.tree.map(lambda y: placed(y.shape, y.dtype), parameters)
    with sharding.use_mesh(mesh):
        return jax.jit(both).lower(parameters, x, ids, x).compile().as_text(), name


if __name__ == "__main__":
    from jaxlinear import cli

    cli.run(main)
