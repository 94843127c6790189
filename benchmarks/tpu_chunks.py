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

import functools
import itertools
import json
import pathlib
import re
import sys

import schedules
from absl import flags

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "v5e, v5p, v6e or tpu7x, and the shape of the slice.")
_OPERATIONS = flags.DEFINE_list("operations", ["delta_rule", "linear_attention"], "Of jaxlinear.ops.")
_DECAYS = flags.DEFINE_list(
    "decays",
    ["none", "scalar", "channel"],
    "No decay; one per head, constant (linear attention only) or not; one per key channel.",
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
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
_WAYS = {"in_parts": "FactoredInParts", "in_small_parts": "FactoredInSmallParts", "strong": "FactoredInFours"}
_WAY = flags.DEFINE_enum("way", None, list(_WAYS), "Internal: the only code path of a decay by channel.")
_WORKER = flags.DEFINE_list("worker", None, "Internal: compile this operation, decay and backend; print a report.")
_BLOCK = flags.DEFINE_list(
    "block",
    None,
    "Internal: a block's chunk and lanes for the delta rule; its time, chunk and lanes for linear attention.",
)

KINDS = ("forward", "gradient")
# Recorded with the result, and passed to each worker.
_OPTIONS = ("topology", "batch", "length", "heads", "key", "value", "shared", "negative_eigenvalues", "dtype")


def main() -> None:
    if _WORKER.value:
        print(json.dumps(_compile(*_WORKER.value)))
        return
    result: dict = {name: flags.FLAGS[name].value for name in _OPTIONS}
    result["rows"] = _tuning() if _TUNE.value else _comparison()
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


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


def _report(operation: str, decay: str, backend: str, *more: str) -> dict:
    """The worker's report, with a row for each code path of a kernel."""
    report = _worker(operation, decay, backend, *more)
    if backend == "pallas" and decay == "channel" and _DTYPE.value == "bfloat16":
        ways = {way: _worker(operation, decay, backend, f"--way={way}", *more)["kernels"] for way in _WAYS}
        report["kernels"] = _each_way(report["kernels"], ways)
    return report


def _each_way(all_ways: list[dict], ways: dict[str, list[dict]]) -> list[dict]:
    """For each kernel with all paths, a row for its part for weak decays, and one for each kernel of the other ``ways``."""
    rows = []
    for whole, *others in zip(all_ways, *ways.values(), strict=True):
        assert all(other["name"] == whole["name"] for other in others)
        part = (whole["cycles"] - sum(other["cycles"] for other in others)) / whole["cycles"]
        weak = {name: whole[name] * part for name in ("cycles", "compute_us")}
        weak |= {name: whole[name] / part for name in ("peak", "at_64")}
        rows.append(whole | weak | {"name": whole["name"] + ", weak"})
        rows += [other | {"name": f"{other['name']}, {way}"} for way, other in zip(ways, others, strict=True)]
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
                report = _report(operation, decay, "pallas", "--block=" + ",".join(map(str, block)))
                cycles = {row["name"]: row["cycles"] for row in report["kernels"]}
                rows.append({"operation": operation, "decay": decay, **dict(zip(sizes, block, strict=True)), **cycles})
                named = " ".join(f"{name} {size:4}" for name, size in zip(sizes, block, strict=True))
                print(f"{operation} {decay:8} {named}: {cycles}", flush=True)
    return rows


def _worker(operation: str, decay: str, backend: str, *more: str) -> dict:
    options = [f"--{name}={flags.FLAGS[name].value}" for name in _OPTIONS]
    return schedules.in_process([sys.executable, __file__, f"--worker={operation},{decay},{backend}", *options, *more])


def _compile(operation: str, decay: str, backend: str) -> dict:
    directory = schedules.begin()
    import jax

    from jaxlinear import ops
    from jaxlinear.ops import backends
    from jaxlinear.pallas.delta_rule import blocks as delta_rule_blocks
    from jaxlinear.pallas.linear_attention import blocks as linear_attention_blocks
    from jaxlinear.pallas.parts import factored_decays

    if _WAY.value:
        kind_of = getattr(factored_decays, _WAYS[_WAY.value])
        factored_decays.each_way = lambda log_decays, narrow, wide, work: work(kind_of)
    batch, length, heads, key, value = (flag.value for flag in (_BATCH, _LENGTH, _HEADS, _KEY, _VALUE))
    kind = schedules.device(_TOPOLOGY.value).device_kind
    if _BLOCK.value:
        *sizes, chunk, lanes = map(int, _BLOCK.value)
        if operation == "delta_rule":
            delta_rule_blocks.TPU[kind] = delta_rule_blocks.Block(chunk, chunk, lanes)
        else:
            linear_attention_blocks.TPU[kind] = (linear_attention_blocks.Block(*sizes, chunk, lanes),) * 2
    by_head = jax.ShapeDtypeStruct((batch, length, heads), "float32")
    wide = functools.partial(jax.ShapeDtypeStruct, dtype=_DTYPE.value)
    key_heads = 1 if _SHARED.value else heads
    q, v = wide((batch, length, key_heads * key)), wide((batch, length, heads * value))
    constant = jax.ShapeDtypeStruct((heads,), "float32")
    by_channel = wide((batch, length, heads * key))
    log_decay = {"none": None, "constant": constant, "scalar": by_head, "channel": by_channel}[decay]
    beta = by_head if operation == "delta_rule" else None
    options = {"negative_eigenvalues": _NEGATIVE.value} if operation == "delta_rule" else {}
    state = jax.ShapeDtypeStruct((batch, heads, key, value), "float32")

    def forward(inputs):
        *arrays, beta, log_decay, state = inputs
        q, k, v = (x.reshape(batch, length, n, -1) for x, n in zip(arrays, (key_heads, key_heads, heads), strict=True))
        if decay == "channel":
            log_decay = log_decay.reshape(batch, length, heads, -1)
        more = () if beta is None else (beta,)
        with backends.use_platform("tpu", kind):
            o, final = getattr(ops, operation)(q, k, v, *more, log_decay, state, backend=backend, **options)
        return o.reshape(batch, length, -1), final

    def both(inputs, cotangents):
        outputs, pullback = jax.vjp(forward, inputs)
        with backends.use_platform("tpu", kind):
            return outputs, pullback(cotangents)

    compiled = schedules.compile_for(_TOPOLOGY.value, both, (q, q, v, beta, log_decay, state), (v, state))
    report = schedules.report(directory, compiled, _TOPOLOGY.value)
    size = [x.size * x.dtype.itemsize for x in (q, q, v, log_decay, beta) if x is not None]
    moved = {"forward": sum(size) + size[2], "gradient": 2 * sum(size) + size[2]}
    bandwidth, clock = schedules.RATES[_TOPOLOGY.value.partition(":")[0]]
    found = []
    for name, cycles in report["kernels"].items():
        direction = next((word for word in KINDS if f"{operation}_{word}" in name), None)
        if direction is None:
            continue
        peak = cycles * schedules.MATRIX_UNIT[_TOPOLOGY.value.partition(":")[0]]
        short = re.search(rf"{operation}_[a-z_]*[a-z]", name)[0]
        row = {"name": short, "kind": direction, "cycles": cycles / (batch * length * heads) * 128}
        row |= {"compute_us": 1e6 * cycles / clock, "memory_us": 1e6 * moved[direction] / bandwidth}
        used = _chunk(operation, decay, kind)
        row |= {"peak": _operations(operation, direction, decay, used) / peak}
        found.append(row | {"at_64": _operations(operation, direction, decay, 64) / peak})
    found.sort(key=lambda row: KINDS.index(row["kind"]))  # they may have been compiled in another order
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
    from jaxlinear import cli

    cli.run(main)
