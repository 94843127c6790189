"""Static schedules of the TPU kernels of matrix states: what fraction of the matrix unit's peak their products reach.

    python benchmarks/tpu_chunks.py [--operations=delta_rule,linear_attention] [--decays=none,constant,scalar,channel]
        [--topology=v5e:2x2] [--batch=1 --length=4096 --heads=16 --key=128 --value=128] [--shared]
        [--negative_eigenvalues] [--dtype=bfloat16] [--json=FILE]
    python benchmarks/tpu_chunks.py --tune [--operations=...] [--topology=...]      # cycles by block size

The script needs the compiler for TPU (pip install 'jaxlinear[aot]') and compiles every program in its own process. For each
kernel:

    cycles         bundles of the schedule x trips of its loops, per 128 tokens of a head
    compute        the time of the cycles at the chip's clock rate, for the whole array
    memory         the time of the bytes that the kernel must read and write, at the bandwidth of the chip's HBM
    peak %         the operations of the chunked form's products at the chunk size in use, over those that the matrix unit
                   could do in as many cycles; the inverse and the extra work of a decay by channel are not counted
    at 64 %        the same with the operations of chunks of 64 tokens, so that larger chunks do not inflate the figure

In bfloat16 a kernel with a decay by channel has four code paths: one for blocks of chunks in which no decay is strong, two
for those in which none is strong within parts of a chunk, of 16 tokens or of 8, and one for all others
(``pallas/parts/factored_decays.py``). Each has a row. The last three are measured in programs with that path alone; the
first is what a program with all four takes beyond these three, including the choice of path.

Sizes under ``--tune`` are those of the tables in ``pallas/FAMILY/blocks.py``, whose functions shorten blocks of many heads.
``--chunked`` also prints the bytes that the instructions of both passes read and write, with and without the kernel.
Schedules are lower bounds on the time, not timings.
"""

import itertools
import math
import re

import common
import schedules
from absl import flags

from jaxlinear import cli

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "v5e, v5p, v6e or tpu7x, and the shape of the slice.")
_OPERATIONS = flags.DEFINE_list("operations", ["delta_rule", "linear_attention"], "Of jaxlinear.ops.")
_DECAYS = flags.DEFINE_list(
    "decays",
    ["none", "scalar", "channel"],
    "None; per head, constant (linear attention only) or not (scalar); per key channel.",
)
_BATCH = flags.DEFINE_integer("batch", 1, "B.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 4096, "T.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 16, "H.", lower_bound=1)
_KEY = flags.DEFINE_integer("key", 128, "K.", lower_bound=1)
_VALUE = flags.DEFINE_integer("value", 128, "V.", lower_bound=1)
_SHARED = flags.DEFINE_bool("shared", False, "One query and one key for all heads; linear attention only.")
_NEGATIVE = flags.DEFINE_bool("negative_eigenvalues", False, "The delta rule's option of that name.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Dtype of q, k and v.")
_CHUNKED = flags.DEFINE_bool("chunked", False, "Also compile the program without the kernel, which takes minutes.")
_TUNE = flags.DEFINE_bool("tune", False, "Instead, print cycles by block size.")
common.define_json()

_RECORDED = _TOPOLOGY, _BATCH, _LENGTH, _HEADS, _KEY, _VALUE, _SHARED, _NEGATIVE, _DTYPE
# The code paths of a decay by channel but the first, each by what it is called in ``factored_decays``.
_PATHS = {"in_parts": "FactoredInParts", "in_small_parts": "FactoredInSmallParts", "strong": "FactoredInFours"}
DIRECTIONS = ("forward", "gradient")


def main() -> None:
    rows = _tuning() if _TUNE.value else _comparison()
    common.write({flag.name: flag.value for flag in _RECORDED} | {"rows": rows})


def _comparison() -> list[dict]:
    columns = ("cycles", 8), ("compute us", 11), ("memory us", 10), ("peak %", 7), ("at 64 %", 8)
    print(f"{'':42}", *(f"{name:>{width}}" for name, width in columns))
    rows, backends = [], ("pallas", "chunked") if _CHUNKED.value else ("pallas",)
    for operation in _OPERATIONS.value:
        for decay in _DECAYS.value:
            reports = {backend: _report(operation, decay, backend) for backend in backends}
            for row in reports["pallas"]["kernels"]:
                print(
                    f"{row['name']:42} {row['cycles']:8.0f} {row['compute_us']:11.0f} {row['memory_us']:10.0f} "
                    f"{100 * row['peak']:7.1f} {100 * row['at_64']:8.1f}",
                    flush=True,
                )
            if _CHUNKED.value:
                moved = ", ".join(f"{backend} {report['bytes'] / 1e9:.2f} GB" for backend, report in reports.items())
                print(f"    bytes of both passes: {moved}")
            rows.append({"operation": operation, "decay": decay, **reports})
    return rows


def _report(operation: str, decay: str, backend: str, block: tuple[int, ...] = ()) -> dict:
    """The report of one program, with a row for each code path of a kernel."""
    report = schedules.in_process(_compile, operation, decay, backend, block)
    if backend == "pallas" and decay == "channel" and _DTYPE.value == "bfloat16":
        others = {path: schedules.in_process(_compile, operation, decay, backend, block, path) for path in _PATHS}
        report["kernels"] = _by_path(report["kernels"], {path: other["kernels"] for path, other in others.items()})
    return report


def _by_path(whole: list[dict], paths: dict[str, list[dict]]) -> list[dict]:
    """For each kernel with all paths, a row for its part for weak decays, and one for each of the other ``paths``."""
    rows = []
    for kernel, *others in zip(whole, *paths.values(), strict=True):
        assert all(other["name"] == kernel["name"] for other in others)
        part = (kernel["cycles"] - sum(other["cycles"] for other in others)) / kernel["cycles"]
        weak = {name: kernel[name] * part for name in ("cycles", "compute_us")}
        weak |= {name: kernel[name] / part for name in ("peak", "at_64")}
        rows.append(kernel | weak | {"name": kernel["name"] + ", weak"})
        rows += [other | {"name": f"{other['name']}, {path}"} for path, other in zip(paths, others, strict=True)]
    return rows


def _tuning() -> list[dict]:
    rows = []
    for operation in _OPERATIONS.value:
        delta_rule = operation == "delta_rule"
        for decay in _DECAYS.value:
            # Chunks of 256 suit matrix units of 256 channels, but the inverse and the levels of a decay by channel grow
            # with them.
            chunks = (64, 128) if delta_rule else (128,) if decay == "channel" else (128, 256)
            sizes = {"chunk": chunks, "lanes": (512, 1024, 2048) if delta_rule else (256, 512, 1024)}
            if not delta_rule:
                sizes = {"time": (256, 512, 1024)} | sizes
            for block in itertools.product(*sizes.values()):
                report = _report(operation, decay, "pallas", block)
                cycles = {row["name"]: row["cycles"] for row in report["kernels"]}
                rows.append({"operation": operation, "decay": decay, **dict(zip(sizes, block, strict=True)), **cycles})
                named = " ".join(f"{name} {size:4}" for name, size in zip(sizes, block, strict=True))
                print(f"{operation} {decay:8} {named}: {cycles}", flush=True)
    return rows


def _compile(
    directory: str, operation: str, decay: str, backend: str, block: tuple[int, ...], path: str | None = None
) -> dict:
    """``block``: chunk and lanes for the delta rule; time, chunk and lanes for linear attention. ``path``: the only code
    path of a decay by channel."""
    import cases
    import jax

    from jaxlinear.launching import device_check
    from jaxlinear.ops import backends
    from jaxlinear.pallas.delta_rule import blocks as delta_rule_blocks
    from jaxlinear.pallas.linear_attention import blocks as linear_attention_blocks
    from jaxlinear.pallas.parts import factored_decays

    if path:
        kind_of = getattr(factored_decays, _PATHS[path])
        factored_decays.each_way = lambda log_decays, narrow, wide, work: work(kind_of)
    chip = _TOPOLOGY.value.partition(":")[0]
    kind = schedules.device(_TOPOLOGY.value).device_kind
    if block and operation == "delta_rule":
        chunk, lanes = block
        delta_rule_blocks.TPU[kind] = delta_rule_blocks.Block(chunk, chunk, lanes)
    elif block:
        linear_attention_blocks.TPU[kind] = (linear_attention_blocks.Block(*block),) * 2
    shape = batch, length, heads, _, _ = [flag.value for flag in (_BATCH, _LENGTH, _HEADS, _KEY, _VALUE)]
    options = {"negative_eigenvalues": _NEGATIVE.value} if operation == "delta_rule" else {}
    name = operation if decay == "none" else f"{operation}_{decay}"
    call = cases.case(name, *shape, dtype=_DTYPE.value, key_heads=1 if _SHARED.value else None, **options)
    split, run = call.arrays, device_check.outputs_of(call, backend)

    def beside_each_other(x):  # the channels of all heads, as in a layer
        return jax.ShapeDtypeStruct((batch, length, math.prod(x.shape[2:])), x.dtype) if x.ndim == 4 else x

    def on_channels(arrays):
        o, state = run({name: x.reshape(split[name].shape) if name in split else x for name, x in arrays.items()})
        return o.reshape(batch, length, -1), state

    arrays = {name: beside_each_other(x) for name, x in split.items()}
    with backends.use_platform("tpu", kind):
        outputs = jax.eval_shape(on_channels, arrays)
        given = arrays | {"initial_state": outputs[1]}
        compiled = schedules.compile_for(_TOPOLOGY.value, device_check.with_gradients(on_channels), given, outputs)
    report = schedules.report(directory, compiled, _TOPOLOGY.value)
    inputs, output = (sum(x.size * x.dtype.itemsize for x in some) for some in (arrays.values(), outputs[:1]))
    moved = {"forward": inputs + output, "gradient": 2 * inputs + output}
    bandwidth, clock = schedules.RATES[chip]
    found = []
    for direction in DIRECTIONS:
        products = [_operations(operation, direction, decay, n) for n in (_chunk(operation, decay, kind), 64)]
        for name, cycles in report["kernels"].items():
            if short := re.search(rf"{operation}_{direction}[a-z_]*", name):
                peak = cycles * schedules.MATRIX_UNIT[chip]
                row = {
                    "name": short[0].rstrip("_"),
                    "kind": direction,
                    "cycles": cycles / (batch * length * heads) * 128,
                }
                row |= {"compute_us": 1e6 * cycles / clock, "memory_us": 1e6 * moved[direction] / bandwidth}
                found.append(row | {"peak": products[0] / peak, "at_64": products[1] / peak})
    return {"kernels": found, "bytes": report["bytes"], "relayouts": report["relayouts"]}


def _chunk(operation: str, decay: str, kind: str) -> int:
    from jaxlinear.pallas.delta_rule import blocks as delta_rule_blocks
    from jaxlinear.pallas.linear_attention import blocks as linear_attention_blocks

    length, by_channel = _LENGTH.value, decay == "channel"
    if operation == "delta_rule":
        return delta_rule_blocks.chunk_of(kind, length, by_channel, None)
    widths = (_VALUE.value,) if _SHARED.value else (_KEY.value, _VALUE.value)
    size = 4 if _DTYPE.value == "float32" else 2
    return linear_attention_blocks.tpu(kind, length, _HEADS.value, widths, by_channel, None, size)[1]


def _operations(operation: str, direction: str, decay: str, chunk: int) -> float:
    """Floating point operations of the products, for all tokens and heads."""
    from jaxlinear.pallas.delta_rule import plan as delta_rule_plan
    from jaxlinear.pallas.linear_attention import plan as linear_attention_plan

    length, *shape = (flag.value for flag in (_LENGTH, _HEADS, _KEY, _VALUE))
    if operation == "delta_rule":
        plan = delta_rule_plan.Plan(direction, length, *shape, decay, False, 1.0, None, None)
    else:
        plan = linear_attention_plan.Plan(direction, *shape, decay, False, 1.0)
    return plan.products(chunk) * _BATCH.value * length * _HEADS.value


if __name__ == "__main__":
    cli.run(main)
