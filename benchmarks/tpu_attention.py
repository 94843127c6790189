"""Static schedules of JAX's splash attention for TPU by block size, the source of the table in
``jaxlinear/pallas/attention/blocks.py``.

    python benchmarks/tpu_attention.py [--topology=v5e:1x1] [--tokens=512,1024 --keys=256,512] [--json=FILE]
        [--length=8192 --window=8192 --heads=4 --key_heads=1 --width=128] [--dtype=bfloat16]

The script needs the compiler for TPU (pip install 'jaxlinear[aot]') and compiles every program in its own process. For each
block of --tokens tokens, whose queries are multiplied with --keys keys at once, and each of the three kernels:

    cycles         bundles of the schedule x steps of the grid in which some query sees some key, per 128 queries and 128
                   keys of one head, seen or not
    whole          cycles of the three kernels per 128 tokens of a head, over the blocks that are visited
    peak %         the products that the forward and backward passes need (two and five) for pairs that are seen, over
                   those that the matrix unit could do in as many cycles

Schedules are lower bounds on the time, not timings.
"""

import itertools

import common
import schedules
from absl import flags

from jaxlinear import cli

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:1x1", "v5e, v5p, v6e or tpu7x, and the shape of the slice.")
_TOKENS = flags.DEFINE_list("tokens", ["512", "1024"], "Queries, and also keys, per block.")
_KEYS = flags.DEFINE_list("keys", ["256", "512"], "Keys multiplied at once.")
_LENGTH = flags.DEFINE_integer("length", 8192, "T.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", 8192, "Keys that a query sees.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 4, "Query heads.", lower_bound=1)
_KEY_HEADS = flags.DEFINE_integer("key_heads", 1, "Key and value heads.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 128, "Channels of a head.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Dtype of q, k and v.")
common.define_json()

KERNELS = ("fwd", "dq", "dkv")
_RECORDED = _TOPOLOGY, _LENGTH, _WINDOW, _HEADS, _KEY_HEADS, _WIDTH, _DTYPE


def main() -> None:
    print(f"{'tokens':>8} {'keys':>6}", *(f"{name + ' cycles':>12}" for name in KERNELS), f"{'whole':>8} {'peak %':>8}")
    rows = []
    for tokens, keys in itertools.product(*(map(int, flag.value) for flag in (_TOKENS, _KEYS))):
        if tokens % keys or tokens > _LENGTH.value:
            continue
        row = schedules.in_process(_compile, tokens, keys)
        cycles = (f"{row['cycles'][name]:12.1f}" for name in KERNELS)
        print(f"{tokens:8} {keys:6}", *cycles, f"{row['whole']:8.0f} {100 * row['peak']:8.1f}", flush=True)
        rows.append({"tokens": tokens, "keys": keys, **row})
    common.write({flag.name: flag.value for flag in _RECORDED} | {"rows": rows})


def _compile(directory: str, tokens: int, keys: int) -> dict:
    import cases
    import jax

    from jaxlinear.launching import device_check
    from jaxlinear.ops import backends
    from jaxlinear.pallas.attention import blocks
    from jaxlinear.pallas.attention import tpu as attention_tpu

    blocks.tpu, blocks.TPU_KEYS = (lambda *_: tokens), keys
    length, heads, width, window = _LENGTH.value, _HEADS.value, _WIDTH.value, min(_WINDOW.value, _LENGTH.value)
    options = {"dtype": _DTYPE.value, "key_heads": _KEY_HEADS.value, "documents": True, "window": window}
    call = cases.case("sliding_window_attention", 1, length, heads, width, width, **options)
    run = device_check.outputs_of(call, "pallas")
    with backends.use_platform("tpu", schedules.device(_TOPOLOGY.value).device_kind):
        outputs = jax.eval_shape(run, call.arrays)
        schedules.compile_for(_TOPOLOGY.value, device_check.with_gradients(run), call.arrays, outputs)
    mask = attention_tpu._Window((-(-length // tokens) * tokens,) * 2, window, 0)
    visited, blocks_in_line = mask.visited(tokens), mask.shape[0] // tokens
    # The visited share of the grid's steps. Every line of blocks has as many as the longest one; on v5p, two cores share
    # them.
    most = min(blocks_in_line, -(-(window - 1) // tokens) + 1)
    share = visited / (blocks_in_line * most)
    cycles = {}
    for name, (bundles, _) in schedules.kernels(directory).items():
        kernel = next((kernel for kernel in KERNELS if f"_{kernel}_" in name), None)
        if kernel is not None:
            (grid,) = schedules.loops(bundles)
            cycles[kernel] = (grid.last + 1 - grid.first) * (grid.trips - 2) * share
    whole = sum(cycles.values())
    seen = sum(min(n + 1, window) for n in range(length))
    needed = 7 * 2 * heads * seen * width
    return {
        "cycles": {name: n / (heads * visited) / (tokens / 128) ** 2 for name, n in cycles.items()},
        "whole": whole / heads / length * 128,
        "peak": needed / whole / schedules.MATRIX_UNIT[_TOPOLOGY.value.partition(":")[0]],
    }


if __name__ == "__main__":
    cli.run(main)
