"""The PTX instructions that the GPU kernels of matrix states execute, and what they imply for the time on an H100.

    python benchmarks/gpu_instructions.py [--operations=linear_attention,delta_rule] [--decays=none,scalar,channel]
        [--length=1024 --heads=1 --key=128 --value=128] [--shared] [--negative_eigenvalues] [--mean=-0.04]
        [--against=FLA/bin/python] [--json=FILE]
    python benchmarks/gpu_instructions.py --operations=selective_scan --decays=channel --key=16 --length=256
    python benchmarks/gpu_instructions.py --operations=rg_lru --decays=channel

No GPU is needed: Triton and LLVM compile the kernels for an H100, and ``tests/ptx`` runs them on the CPU instruction by
instruction, so that loops and branches count as often as they are executed. The script needs the compiler for GPU (pip
install 'jaxlinear[aot]') and a clone of the repository. Decays by channel are float32, as in the models. A head of the
selective scan is V channels of K numbers each, and of the RG-LRU V channels. For each kernel, per 64 tokens of a head:

    instructions   PTX instructions that warps execute
    issue          cycles of one SM for these, at four per cycle
    matrix         cycles of its tensor cores for the products, at their peak
    memory         cycles for all bytes that the kernel reads and writes, once, at the SM's share of the HBM bandwidth

For each pass it prints their sums and ``larger``: the larger of issue and memory, summed over the kernels, since these run
one after another.

With ``--against`` the kernels of flash-linear-attention (FLA: see fla_instructions.py) are counted in the same way, and
``times`` is their ``larger`` over ours. Our kernels also read and write a float32 state, once.

PTX is not what the GPU runs: ptxas drops moves and address conversions, some instructions take the place of several, and
warps wait. The figures are neither timings nor bounds, but a kernel whose issue is well above its memory is unlikely to be
as fast as its bytes allow.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

sys.path.append(str(pathlib.Path(__file__).parents[1]))

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

import cases
import common
import jax
import jax.numpy as jnp
from absl import app, flags
from instructions import row, together

from jaxlinear.launching import device_check
from jaxlinear.ops import backends
from jaxlinear.pallas.parts.target import Target
from tests.ptx import calls

_OPERATIONS = flags.DEFINE_list("operations", ["linear_attention", "delta_rule"], "Of jaxlinear.ops.")
_DECAYS = flags.DEFINE_list("decays", ["none", "scalar", "channel"], "No decay, one per head, or one per key channel.")
_LENGTH = flags.DEFINE_integer("length", 1024, "T.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 1, "H.", lower_bound=1)
_KEY = flags.DEFINE_integer("key", 128, "K.", lower_bound=1)
_VALUE = flags.DEFINE_integer("value", 128, "V.", lower_bound=1)
_SHARED = flags.DEFINE_bool("shared", False, "One query and one key for all heads; linear attention only.")
_NEGATIVE = flags.DEFINE_bool("negative_eigenvalues", False, "The delta rule's option of that name.")
_MEAN = flags.DEFINE_float("mean", -0.04, "Mean of the log decays, whose distribution is exponential.", upper_bound=0.0)
_AGAINST = flags.DEFINE_string("against", None, "The Python of an environment with flash-linear-attention.")
common.define_json()

_OF_CHANNELS = {"selective_scan", "rg_lru"}  # their kernels have instructions that are written in PTX: not interpreted

for _flag, _known in (
    ("operations", {"linear_attention", "delta_rule", *_OF_CHANNELS}),
    ("decays", {"none", "scalar", "channel"}),
):
    flags.register_validator(_flag, _known.issuperset, f"of {', '.join(sorted(_known))}")


def run(operation: str, decay: str) -> None:
    """Runs both passes. Documents of the RG-LRU end in the middle."""
    name = operation if decay == "none" or operation in _OF_CHANNELS else f"{operation}_{decay}"
    options = {"negative_eigenvalues": _NEGATIVE.value} if operation == "delta_rule" else {}
    options |= {"decay_dtype": "float32", "key_heads": 1 if _SHARED.value else None, "documents": operation == "rg_lru"}
    call = cases.case(name, 1, _LENGTH.value, _HEADS.value, _KEY.value, _VALUE.value, **options)
    forward = device_check.outputs_of(call, "pallas")

    def sums(arrays):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in forward(arrays))

    jax.block_until_ready(device_check.with_gradients(sums)(cases.values(call, _MEAN.value), jnp.float32(1)))


def theirs(operation: str, decay: str) -> list[dict[str, Any]]:
    """The rows of flash-linear-attention's kernels."""
    name = operation if decay == "none" else f"{operation}_{decay}"
    shape = "x".join(map(str, (1, _LENGTH.value, _HEADS.value, _KEY.value)))
    script = pathlib.Path(__file__).with_name("fla_instructions.py")
    command = [_AGAINST.value, str(script), name, f"--shape={shape}", f"--mean={_MEAN.value}"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        sys.exit(f"--against={_AGAINST.value} is not a Python")
    if done.returncode:
        sys.exit(f"the comparison side ended with status {done.returncode}; its reason is above")
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def table(rows: list[dict[str, Any]]) -> None:
    print("\n| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for line in rows:
        print("| " + " | ".join(f"{x:,}" if isinstance(x, int) else str(x) for x in line.values()) + " |")


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not a flag: {argv[1]}")
    if _AGAINST.value and _KEY.value != _VALUE.value:
        raise app.UsageError("--against requires --key and --value to be equal")
    if _SHARED.value and (_AGAINST.value or set(_OPERATIONS.value) != {"linear_attention"}):
        raise app.UsageError("--shared is of --operations=linear_attention only, and not for --against")
    if _OF_CHANNELS.intersection(_OPERATIONS.value) and (_AGAINST.value or set(_DECAYS.value) != {"channel"}):
        names = " and ".join(sorted(_OF_CHANNELS))
        raise app.UsageError(f"{names} require --decays=channel, and are not for --against")
    ran = calls.emulate(setattr)
    rows, passes, compared = [], [], []
    share = 64 / (_LENGTH.value * _HEADS.value)
    for operation in _OPERATIONS.value:
        for decay in _DECAYS.value:
            del ran[:]
            interpreted = operation not in _OF_CHANNELS
            backends.target = functools.partial(Target, "gpu", "NVIDIA H100 80GB HBM3", interpreted)
            run(operation, decay)
            found = [row(x.name, x.counts, x.bytes, share) for x in ran]
            rows += found
            others = theirs(operation, decay) if _AGAINST.value else []
            for direction in ("forward", "gradient"):
                name = f"{operation}, {decay}, {direction}"
                ours = together(name, [x for x in found if direction in x["kernel"]])
                passes.append(ours)
                if others:
                    other = together(name, [x for x in others if x["direction"] == direction])
                    compared.append({**other, "times": round(other["larger"] / ours["larger"], 2)})
            rows += [{name: x for name, x in other.items() if name != "direction"} for other in others]
    print(f"for 64 tokens of a head, K = {_KEY.value}, V = {_VALUE.value}, T = {_LENGTH.value}, H100; cycles of one SM")
    table(rows)
    table(passes)
    if compared:
        print("\nflash-linear-attention")
        table(compared)
    common.write({"kernels": rows, "passes": passes, "compared": compared})


if __name__ == "__main__":
    app.run(main)
