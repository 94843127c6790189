"""GPUs other than the targets that users can compile for without the hardware: on these, kernels have other blocks, or do
not run. For an absent GPU, JAX 0.12 compiles only under names it knows, such as L40 for an L40S."""

from typing import NamedTuple


class _GPU(NamedTuple):
    name: str
    capability: str
    shared_memory: int  # per block
    of_core: int
    cores: int
    threads: int  # per core
    memory: int


GPUS = {
    "a100": _GPU("NVIDIA A100-SXM4-80GB", "major: 8", 166_912, 167_936, 108, 2048, 85_000_000_000),
    "b200": _GPU("NVIDIA B200", "major: 10", 232_448, 233_472, 148, 2048, 191_000_000_000),
    "l40": _GPU("NVIDIA L40", "major: 8 minor: 9", 101_376, 102_400, 142, 1536, 48_000_000_000),
    "t4": _GPU("Tesla T4", "major: 7 minor: 5", 65_536, 65_536, 40, 1024, 15_800_000_000),
}
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {of_core}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 860000000000 l2_cache_size: 4194304
  clock_rate_ghz: 1.6 device_memory_size: {memory} shared_memory_per_block_optin: {shared_memory}
  cuda_compute_capability {{ {capability} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def device(name: str):
    """One of ``GPUS`` as a device to compile for."""
    from jax.experimental import topologies

    description = _DESCRIPTION.format(**GPUS[name]._asdict())
    return topologies.get_topology_desc(name, "cuda", topology="1x1x1", target_config=description).devices[0]
