"""Peak performance of devices: the denominator of MFU."""

import functools
import time

import jax
import jax.numpy as jnp

# Dense matrix FLOP/s by device kind, from the vendors' data sheets: bfloat16 with float32 accumulation, no sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # of a chip, whose halves are two devices
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of one device; None if it is not in the table. For a CPU, the measured float32 matrix rate."""
    if device.platform == "cpu":
        return _measured_cpu_flops() / sum(d.platform == "cpu" for d in jax.devices())
    return PEAK_FLOPS.get(device.device_kind)


@functools.cache
def _measured_cpu_flops() -> float:
    """The best rate of a few products of 1024 x 1024 float32 matrices on all cores."""
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
