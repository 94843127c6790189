"""The cost of decoding a token, read from the program compiled for a device that need not be present.

    python benchmarks/decode_compiled.py --model=griffin_1b3 --layers=3 --topology=h100:1      # or v5e:2x2, its first chip
        [--streams=8 --length=2048] [--wide] [--json=FILE]

The script needs the compilers (pip install 'jaxlinear[aot]'). Activations are bfloat16. For all streams together:

    parameters     bytes of the parameters as decoding holds them, in MiB
    moved          a bound on the bytes that a token's instructions read and write, in MiB: all operands and results
    memory         arguments, results and temporaries, on TPU the most of them at any time, in MiB
    cycles         libtpu's estimate for a token's instructions, counting both branches of a conditional; on TPUs only

``generate`` decodes a single stream together with a copy of it; --streams=1 and 2 show why. With ``--wide`` the parameters
are the float32 ones of training, not rounded by ``for_decoding``. Nothing is timed: on GPU the matrix products are XLA's
own, not Triton's, whose tiles are found by timing.
"""

import dataclasses
import json
import re
from typing import NamedTuple

from absl import flags

from jaxlinear import cli

_MODEL = flags.DEFINE_string("model", "griffin_1b3", "A preset.")
_LAYERS = flags.DEFINE_integer("layers", 3, "Layers of the model.", lower_bound=1)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32_000, "Size of the vocabulary.", lower_bound=2)
_TOPOLOGY = flags.DEFINE_string("topology", "h100:1", "As for launch/compile.py; its first device is used.")
_STREAMS = flags.DEFINE_integer("streams", 8, "Prompts continued together, B.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens that softmax attention remembers.", lower_bound=1)
_WIDE = flags.DEFINE_bool("wide", False, "Use the float32 parameters of training.")
flags.DEFINE_string("json", None, "Also write the result to this file.")

_PIECE = 8  # tokens per call


class Decoding(NamedTuple):
    text: str  # of the compiled program
    parameters: int  # bytes
    memory: int  # bytes


def main() -> None:
    import common  # not above: tests import this file

    from jaxlinear.costs import targets

    targets.set_environment()
    from jaxlinear.models import ModelConfig, presets

    values = presets.find(_MODEL.value)
    values |= {"num_layers": _LAYERS.value, "vocab_size": _VOCABULARY.value, "dtype": "bfloat16"}
    found = compile_for(_TOPOLOGY.value, ModelConfig(**values), _STREAMS.value, _LENGTH.value, wide=_WIDE.value)
    moved, cycles = token_bytes(found.text)
    shown = (_MODEL, _LAYERS, _TOPOLOGY, _STREAMS, _LENGTH, _WIDE)
    mib = {"parameters_mib": found.parameters, "moved_mib": moved, "memory_mib": found.memory}
    result = {flag.name: flag.value for flag in shown} | {name: round(n / 2**20, 1) for name, n in mib.items()}
    result["cycles"] = cycles
    print(json.dumps(result, indent=2))
    common.write(result)


def compile_for(target: str, config, streams: int, length: int, *, wide: bool = False) -> Decoding:
    """Compiles ``generation``'s decoding of a ``ModelConfig`` for the first device of a target."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxlinear import generation
    from jaxlinear.config import default
    from jaxlinear.costs import programs, targets
    from jaxlinear.models import parameters
    from jaxlinear.models.layers import round_for_decoding
    from jaxlinear.parallel import compiler
    from jaxlinear.parallel import mesh as meshes

    mesh = meshes.make_mesh(default().mesh, targets.find(target).devices[:1])
    whole = NamedSharding(mesh, PartitionSpec())

    def place(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

    def make(values):
        # As `for_decoding` does, which cannot be used here: it asks arrays where they are, and these are only shapes.
        model = parameters.describe(config).bind(values)
        if wide:
            return model.unstacked()
        model = model._unstacked(lambda period: round_for_decoding(period, config.activation_dtype))
        round_for_decoding(model, config.activation_dtype)
        return model

    graph, held = nnx.split(nnx.eval_shape(make, parameters.describe(config).shapes))
    held, platform = place(held), mesh.devices.flat[0].platform
    values = generation.Sampling().values
    values |= {"stop": jnp.zeros(1, jnp.int32), "vocab_size": jnp.int32(config.vocab_size)}
    prompts, rows, limit = (place(jax.ShapeDtypeStruct(x, jnp.int32)) for x in ((streams, 16), (streams,), ()))
    static = graph, length, (False, False, False), mesh
    carry, _ = jax.eval_shape(lambda *given: generation._prefill(*static, *given), held, prompts, prompts, rows, values)
    traced = generation._decoder(platform).trace(*static, _PIECE, held, *place((carry, values)), limit)
    compiled = traced.lower().compile(compiler_options=compiler.WITHOUT_DEVICE.get(platform))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    return Decoding(compiled.as_text(), size, programs.read(compiled, mesh).memory.total)


def token_bytes(text: str) -> tuple[int, int | None]:
    """Bytes moved and cycles of one trip of the loop over tokens."""
    from jaxlinear.costs import hlo, programs

    module = hlo.parse(text)
    (loop,) = (line for line in module.computations[module.entry] if line.opcode == "while")
    # The loop's trip count is unknown. Those of the loops inside it are found by reading its body as a separate program.
    (body,) = loop.called
    inner = dataclasses.replace(module, entry=body, runs=hlo.runs(module.computations, body))
    sequences = programs.sequences(inner)
    lines = [(inner.runs[name] or 1, line) for name in sequences for line in module.computations[name]]
    moved = sum(
        times * programs.moved(module, line) for times, line in lines if line.opcode not in ("while", "conditional")
    )
    estimates = [
        times * int(found[1])
        for times, line in lines
        if (found := re.search(r'"estimated_cycles":"(\d+)"', line.attributes))
    ]
    return int(moved), sum(estimates) if estimates else None


if __name__ == "__main__":
    cli.run(main)
