"""The kernels of matrix states for GPU by the instructions that their PTX takes, and what these say of an H100's time.

    python benchmarks/gpu_instructions.py [--operations=linear_attention,delta_rule] [--decays=none,scalar,channel]
        [--length=1024 --heads=1 --key=128 --value=128] [--mean=-0.04] [--json=FILE]

No GPU is needed: kernels are compiled for an H100 by Triton and LLVM, and run on the CPU instruction by instruction
(``tests/ptx``), so that loops and branches count as they go. Takes the compiler for GPU (pip install 'jaxlinear[aot]') and
a clone of the repository. Decays by channel are float32, as models have them. Of each kernel, for 64 tokens of a head:

    instructions   of PTX that warps take
    issue          cycles of one SM, at four of these a cycle
    matrix         cycles that its tensor cores take for the products at their peak
    memory         cycles of the SM in its share of the HBM's bytes, of all that the kernel reads and writes, once

and of each pass their sums, and ``larger``: the sum of the larger of issue and memory, as kernels run one after the other.

PTX is not what the GPU runs: ptxas drops moves and conversions of addresses, some instructions take the place of several,
and warps wait. These are no timings and no bounds; but a kernel whose issue is well above its memory is not likely as fast
as its bytes.
"""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

sys.path.append(str(pathlib.Path(__file__).parents[1]))

from jaxlinear import ops
from jaxlinear.ops import backends
from jaxlinear.pallas.target import Target
from tests.ptx import calls

_OPERATIONS = flags.DEFINE_list("operations", ["linear_attention", "delta_rule"], "Of jaxlinear.ops.")
_DECAYS = flags.DEFINE_list("decays", ["none", "scalar", "channel"], "None; one a head; one a key channel.")
_LENGTH = flags.DEFINE_integer("length", 1024, "T.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 1, "H.", lower_bound=1)
_KEY = flags.DEFINE_integer("key", 128, "K.", lower_bound=1)
_VALUE = flags.DEFINE_integer("value", 128, "V.", lower_bound=1)
_MEAN = flags.DEFINE_float("mean", -0.04, "Of the log decays, whose distribution is exponential.", upper_bound=0.0)
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")

for _flag, _known in (("operations", {"linear_attention", "delta_rule"}), ("decays", {"none", "scalar", "channel"})):
    flags.register_validator(_flag, _known.issuperset, f"of {', '.join(sorted(_known))}")

# Of an H100 SXM, "H100 Tensor Core GPU Architecture": 989.4e12 operations a second on bfloat16 matrices, not sparse.
_MULTIPROCESSORS, _CLOCK, _BANDWIDTH, _OPERATIONS_A_SECOND = 132, 1.83e9, 3.35e12, 989.4e12
_SCHEDULERS = 4  # of a multiprocessor, each with an instruction a cycle
_PRODUCTS = _OPERATIONS_A_SECOND / 2 / _MULTIPROCESSORS / _CLOCK  # multiply-adds of a multiprocessor a cycle
_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)")


def draw(decay: str):
    """The operation's tensors after q, k and v, and these."""
    random, length, heads = np.random.default_rng(0), _LENGTH.value, _HEADS.value
    q, k = (random.standard_normal((1, length, heads, _KEY.value)) for _ in range(2))
    v = random.standard_normal((1, length, heads, _VALUE.value))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    shape = (1, length, heads, _KEY.value) if decay == "channel" else (1, length, heads)
    log_decay = None if decay == "none" else jnp.asarray(_MEAN.value * random.exponential(size=shape), jnp.float32)
    beta = jnp.asarray(random.uniform(size=(1, length, heads)), jnp.float32)
    return [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)], beta, log_decay


def gradient(operation: str, decay: str) -> None:
    """Runs both passes."""
    (q, k, v), beta, log_decay = draw(decay)
    given = (q, k, v) if operation == "linear_attention" else (q, k, v, beta)

    def objective(given, log_decay):
        o, state = getattr(ops, operation)(*given, log_decay, backend="pallas")
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

    jax.block_until_ready(jax.grad(objective, (0, 1) if log_decay is not None else 0)(given, log_decay))


def row(ran: calls.Ran) -> dict:
    parts = 64 / (_LENGTH.value * _HEADS.value)
    products = 0.0
    for opcode, warps in ran.counts.items():
        if opcode.startswith(("mma", "wgmma.mma")):
            rows, columns, steps = map(int, _SHAPE.search(opcode).groups())
            products += warps * rows * columns * steps / (4 if opcode.startswith("wgmma") else 1)
    instructions = parts * sum(ran.counts.values())
    return {
        "kernel": ran.name,
        "instructions": round(instructions),
        "issue": round(instructions / _SCHEDULERS),
        "matrix": round(parts * products / _PRODUCTS),
        "memory": round(parts * ran.bytes / (_BANDWIDTH / _MULTIPROCESSORS / _CLOCK)),
    }


def together(name: str, rows: list[dict]) -> dict:
    sums = {key: sum(x[key] for x in rows) for key in ("instructions", "issue", "matrix", "memory")}
    return {"pass": name, **sums, "larger": sum(max(x["issue"], x["memory"]) for x in rows)}


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not a flag: {argv[1]}")
    ran = calls.emulate(setattr)
    backends.target = lambda: Target("gpu", "NVIDIA H100 80GB HBM3", True)
    rows, passes = [], []
    for operation in _OPERATIONS.value:
        for decay in _DECAYS.value:
            del ran[:]
            gradient(operation, decay)
            found = [row(x) for x in ran]
            rows += found
            for direction in ("forward", "gradient"):
                passes.append(
                    together(f"{operation}, {decay}, {direction}", [x for x in found if direction in x["kernel"]])
                )
    print(f"for 64 tokens of a head, K = {_KEY.value}, V = {_VALUE.value}, T = {_LENGTH.value}, H100; cycles of one SM")
    for table in (rows, passes):
        print("\n| " + " | ".join(table[0]) + " |\n|" + " --- |" * len(table[0]))
        for line in table:
            print("| " + " | ".join(f"{x:,}" if isinstance(x, int) else x for x in line.values()) + " |")
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps({"kernels": rows, "passes": passes}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
