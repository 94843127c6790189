"""The comparison side of ``gpu_instructions.py``: the instructions of flash-linear-attention's kernels, with no GPU.

The script uses nothing from jaxlinear but its emulator, and runs under the Python of its own environment:

    python -m venv FLA && FLA/bin/pip install torch numpy ml_dtypes einops packaging    # torch for the CPU will do
    FLA/bin/pip install --no-deps 'fla-core>=0.6,<0.7' 'triton>=3.7.1,<3.8'
    FLA/bin/python benchmarks/fla_instructions.py delta_rule_scalar --shape=1x1024x1x128

Triton compiles each kernel for an H100, with a stand-in for its driver, and ``tests/ptx`` runs it on the CPU. Where a
kernel has several configurations to choose from by timing, all are compiled and run once and the one with the fewest
instructions is taken, since they move the same bytes. The script prints JSON: the error of the outputs compared with the
recurrence, and a row for each kernel, as made by ``instructions.row``, with its direction. Bytes are those that a kernel
reads plus those that it writes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import types
from collections import Counter
from typing import NamedTuple

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import numpy as np
import torch
import triton
from instructions import row
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from tests.ptx import machine, memory, program

OPERATIONS = [f"{name}{decay}" for name in ("linear_attention", "delta_rule") for decay in ("", "_scalar", "_channel")]
_LENGTH_TRIED = 128  # T at which configurations are compared
_TOLERANCE = 0.02  # of outputs in bfloat16


class Driver:
    """Stands in for an H100's driver, with only what compiling asks for."""

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": memory.SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Ran(NamedTuple):
    kernel: str
    counts: Counter
    bytes: int


class Emulator:
    """Replaces Triton's kernel launches."""

    def __init__(self):
        self.ran: list[Ran] = []
        self._best: dict = {}
        self._compile, emulator = JITFunction.run, self

        def run(function, *arguments, grid, warmup=False, **options):
            return emulator._run(function, arguments, grid, options)

        def tuned(tuner, *arguments, **options):
            return emulator._tuned(tuner, arguments, options)

        JITFunction.run, Autotuner.run = run, tuned

    def _run(self, function, arguments, grid, options):
        kernel = self._compile(function, *arguments, grid=grid, warmup=True, **options)
        if kernel.metadata.shared > memory.SHARED_BYTES:
            raise OutOfResources(kernel.metadata.shared, memory.SHARED_BYTES, "shared memory")
        bind = function.device_caches[0][4]  # how Triton itself names a launch's arguments
        bound, *_ = bind(*arguments, debug=False, **options)
        grid = tuple(map(int, grid(bound) if callable(grid) else grid))
        (read,) = program.read(kernel.asm["ptx"])
        given = [bound[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        storages = {}  # of tensors, which may share them
        for x in given:
            if isinstance(x, torch.Tensor):
                storages.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
        arrays = [torch.tensor([], dtype=torch.uint8).set_(x).numpy() for x in storages.values()]
        plain = memory.Plain(arrays)
        at = dict(zip(storages, plain.addresses, strict=True))

        def parameter(x):
            if not isinstance(x, torch.Tensor):
                return x
            return at[x.untyped_storage().data_ptr()] + x.storage_offset() * x.element_size()

        scratch = [0, 0]  # Triton's own scratch memory, which these kernels do not use
        counts = machine.run_in(plain, read, grid, [*map(parameter, given), *scratch], strict=False)
        plain.give(arrays)
        self.ran.append(Ran(function.__name__, counts, int(plain.read.sum() + plain.written.sum())))
        return kernel

    def _tuned(self, tuner, arguments, options):
        tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
        named = {**tuner.nargs, **options}
        key = tuner.base_fn.__name__, *(str(named.get(name)) for name in tuner.keys if name != "T")
        if key not in self._best:
            self._best[key] = min(
                tuner.prune_configs(options), key=lambda config: self._instructions(tuner, arguments, options, config)
            )
        return tuner.fn.run(*arguments, **{**options, **self._best[key].all_kwargs()})

    def _instructions(self, tuner, arguments, options, config) -> float:
        before = len(self.ran)
        try:
            tuner.fn.run(*arguments, **{**options, **config.all_kwargs()})
        except OutOfResources:
            return np.inf
        finally:
            tried, self.ran[before:] = self.ran[before:], []
        return sum(sum(x.counts.values()) for x in tried)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("--shape", required=True, help="BxTxHxD")
    parser.add_argument("--mean", type=float, default=-0.04, help="mean of the log decays")
    arguments = parser.parse_args()
    triton.runtime.driver.set_active(Driver())
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.device_count = lambda: 1
    properties = types.SimpleNamespace(shared_memory_per_block_optin=memory.SHARED_BYTES, multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *_: properties
    import fla_worker  # it asks the driver which device it is for

    operation, shape = arguments.operation, tuple(map(int, arguments.shape.split("x")))
    emulator = Emulator()
    for length in (_LENGTH_TRIED, shape[1]):
        del emulator.ran[:]
        inputs = draw(operation, (shape[0], length, *shape[2:]), arguments.mean)
        o = fla_worker.OPERATIONS[operation](*inputs)
        forward = len(emulator.ran)
        o.float().sum().backward()
        if length == _LENGTH_TRIED:
            error = error_of(operation, o, inputs)
            if not error < _TOLERANCE:
                sys.exit(f"fla_instructions.py: outputs are off by {error:.1%}, so what was counted is not {operation}")
        share = 64 / (shape[0] * length * shape[2])
        rows = [
            {"direction": "forward" if i < forward else "gradient", **row(*x, share)}
            for i, x in enumerate(emulator.ran)
        ]
    fla_worker.tell(operation=operation, error=error, rows=rows)


def draw(operation: str, shape: tuple[int, ...], mean: float) -> list[torch.Tensor]:
    """q, k, v in bfloat16; log decays and beta as ``gpu_instructions.py`` draws them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    log_decay = mean * torch.empty(shape if operation.endswith("_channel") else shape[:3]).exponential_()
    tensors = *(x.bfloat16() for x in (q, k, v)), log_decay, torch.rand(shape[:3])
    return [x.requires_grad_() for x in tensors]


def error_of(operation: str, o: torch.Tensor, inputs: list[torch.Tensor]) -> float:
    """The relative error of o against the recurrence in float64, in the 2-norm."""
    q, k, v, log_decay, beta = (x.detach().double() for x in inputs)
    decay = torch.ones_like(k)
    if operation.endswith(("_scalar", "_channel")):
        decay = decay * (log_decay if log_decay.ndim == 4 else log_decay[..., None]).exp()
    state, outputs = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[1]):
        state, value = decay[:, t, :, :, None] * state, v[:, t]
        if operation.startswith("delta_rule"):
            value = beta[:, t, :, None] * (value - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * value[:, :, None]
        outputs.append(k.shape[-1] ** -0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    expected = torch.stack(outputs, 1)
    return float((o.detach().double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
