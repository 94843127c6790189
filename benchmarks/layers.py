"""What a layer's mixer costs on a TPU or GPU, forward and backward, instruction by instruction. Neither is needed.

    python benchmarks/layers.py --model=delta_net_1b3 [--mixer=delta_net] [--topology=v5e:2x4] [--rows=2 --length=8192]
        [--top=20] [--json=FILE]
    python benchmarks/layers.py --model=delta_net_1b3 --topology=h100:8

The script needs the compilers (pip install 'jaxlinear[aot]'). The mixer is compiled in bfloat16, with packed documents,
on a mesh of all the topology's devices that splits the batch alone. Of each instruction outside loops, and of all together:

    bytes us      operands and results in HBM, over its bandwidth. On TPU, in whole tiles; arrays that the compiler keeps
                  in VMEM are free. Of arrays that are only cut or updated in place, the part
    cycles us     on TPU: libtpu's schedule, bundles times trips. Of instructions without one, such as copies, 0;
                  of equal ones that of the one that has it
    time us       on TPU: the longer of the two, a bound, as if no two instructions overlapped

On GPU there is no schedule, the bytes are no timing, and what a kernel reads more than once is counted once. What runs
beside other instructions, such as exchanges, is not counted. Arrays of 1 MiB or more are rewritten if a program only puts
them in another order, gives them other axes, or repeats them.
"""

import common
import schedules
from absl import flags

from jaxlinear import cli
from jaxlinear.costs import targets

_MODEL = flags.DEFINE_string("model", "delta_net_1b3", "A preset.")
_MIXER = flags.DEFINE_string("mixer", None, "One of the preset's mixers, by default its first.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "As for launch/compile.py.")
_ROWS = flags.DEFINE_integer("rows", 2, "B on each device.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 8192, "T.", lower_bound=1)
_TOP = flags.DEFINE_integer("top", 0, "Also list so many of the longest instructions.", lower_bound=0)
common.define_json()

_COLUMNS = {"us": "time us", "bytes_us": "bytes us", "cycles_us": "cycles us"}


def main() -> None:
    chip = targets.parts(_TOPOLOGY.value)[1]
    directory = schedules.begin() if chip in targets.DIMENSIONS else None
    targets.set_environment()
    import traffic  # which imports jax

    text, mixer, bandwidth = _compile()
    found = traffic.on_gpu(text) if directory is None else traffic.on_tpu(text)
    for item in found:
        item["bytes_us"] = 1e6 * item["bytes"] / bandwidth
    if directory is not None:
        traffic.add_cycles(found, schedules.schedules(directory))
        for item in found:
            item["cycles_us"] = 1e6 * item["cycles"] / schedules.RATES[chip][1]
            item["us"] = max(item["bytes_us"], item["cycles_us"])
    columns = [column for column in _COLUMNS if column in found[0]]
    rewritten = [item["bytes"] for item in found if item["rewrites"] and item["result"] >= 2**20]
    result = {flag.name: flag.value for flag in (_MODEL, _TOPOLOGY, _ROWS, _LENGTH)} | {"mixer": mixer}
    result |= {name: sum(item[name] for item in found) for name in ("bytes", *columns)}
    result |= {"rewritten": len(rewritten), "rewritten_us": 1e6 * sum(rewritten) / bandwidth}
    print(*(f"{_COLUMNS[column]:>9}" for column in columns))
    for item in sorted(found, key=lambda item: -item[columns[0]])[: _TOP.value]:
        _print(item, columns, f"{item['kind']} {item['name']} {item['operation'][-60:]}")
    summary = f"all, {result['bytes'] / 1e9:.2f} GB; {len(rewritten)} arrays rewritten"
    _print(result, columns, f"{summary}, {result['rewritten_us']:.0f} us of the bytes")
    common.write(result | {"instructions": found})


def _print(item: dict, columns: list[str], label: str) -> None:
    print(*(f"{item[column]:9.0f}" for column in columns), f" {label}")


def _compile() -> tuple[str, str, float]:
    """The text of the compiled program, the mixer's name, and the device's bytes per second of HBM."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxlinear.config import default
    from jaxlinear.costs import devices as figures
    from jaxlinear.models import ModelConfig, mixers, presets
    from jaxlinear.parallel import mesh as meshes
    from jaxlinear.parallel import sharding

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
    bandwidth = figures.device_of(devices[0].device_kind).memory_bandwidth
    with sharding.use_mesh(mesh):
        return jax.jit(both).lower(parameters, x, ids, x).compile().as_text(), name, bandwidth


if __name__ == "__main__":
    cli.run(main)
