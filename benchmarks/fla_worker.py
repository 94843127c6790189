"""The comparison side of ``gpu_kernels.py``: operations of flash-linear-attention (PyTorch and Triton), one round per line.

The script uses nothing from jaxlinear and runs on a GPU under the Python of its own environment:

    python -m venv FLA && FLA/bin/pip install torch 'flash-linear-attention>=0.6,<0.7'
    yes go | FLA/bin/python benchmarks/fla_worker.py gla --shape=2x16384x16x128 --direction=both --rounds=3

It draws inputs in bfloat16, runs the operation until Triton has compiled and tuned it, and prints {"ready": true, ...}. For
each line "go" it runs a round of ``--calls`` calls and prints {"seconds": ..., "device_seconds": ..., "calls": ...}: the
wall-clock time, after waiting for the device, and the time by the device's events. Nothing else goes to standard output.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time

import torch
from fla.ops.delta_rule import chunk_delta_rule
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.gla import chunk_gla
from fla.ops.hgrn import chunk_hgrn
from fla.ops.kda import chunk_kda
from fla.ops.linear_attn import chunk_linear_attn
from fla.ops.simple_gla import chunk_simple_gla

OPERATIONS = {
    "linear_attention": lambda q, k, v, g, beta: chunk_linear_attn(q, k, v, normalize=False)[0],
    "linear_attention_scalar": lambda q, k, v, g, beta: chunk_simple_gla(q, k, v, g=g)[0],
    "linear_attention_channel": lambda q, k, v, g, beta: chunk_gla(q, k, v, g)[0],
    "delta_rule": lambda q, k, v, g, beta: chunk_delta_rule(q, k, v, beta)[0],
    "delta_rule_scalar": lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta)[0],
    "delta_rule_channel": lambda q, k, v, g, beta: chunk_kda(q, k, v, g, beta)[0],
    "linear_recurrence": lambda q, k, v, g, beta: chunk_hgrn(v.flatten(2), g.flatten(2))[0],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operation", choices=list(OPERATIONS))
    parser.add_argument("--shape", required=True, help="BxTxHxD")
    parser.add_argument("--direction", choices=["forward", "both"], required=True)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=None)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("fla_worker.py: there is no GPU")
    go = prepare(arguments.operation, tuple(map(int, arguments.shape.split("x"))), arguments.direction)
    for _ in range(3):
        go()
    torch.cuda.synchronize()
    version = importlib.metadata.version("fla-core")
    tell(ready=True, device=torch.cuda.get_device_name(), version=version)
    for n, _ in enumerate(sys.stdin, start=1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        begin.record()
        for _ in range(arguments.calls):
            go()
        end.record()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        tell(seconds=seconds, device_seconds=begin.elapsed_time(end) / 1000, calls=arguments.calls)
        if n == arguments.rounds:
            return


def prepare(operation: str, shape: tuple[int, ...], direction: str):
    batch, length, heads, _ = shape
    torch.manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    q, k, v = (draw(*shape) for _ in range(3))
    k = torch.nn.functional.normalize(k.float(), dim=-1).bfloat16()
    by_head = (batch, length, heads)
    of_decay = by_head if operation.endswith("_scalar") else shape
    g = torch.nn.functional.logsigmoid(draw(*of_decay).float()) / 16
    if operation.endswith("_channel") or operation == "linear_recurrence":
        g = g.bfloat16()
    beta = torch.sigmoid(draw(*by_head).float()).bfloat16()
    inputs = [x.detach().requires_grad_(direction == "both") for x in (q, k, v, g, beta)]
    run, d_o = OPERATIONS[operation], draw(*shape)

    def go() -> None:
        if direction == "forward":
            with torch.no_grad():
                run(*inputs)
            return
        o = run(*inputs)
        used = [x for x in inputs if x.requires_grad]
        torch.autograd.grad(o, used, d_o.reshape(o.shape), allow_unused=True)

    return go


def tell(**values) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
