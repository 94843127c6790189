"""Options for XLA's compilers, by platform: ``jax.jit``'s ``compiler_options``."""

from jax.sharding import Mesh

Options = dict[str, int | bool | str]

# XLA for GPUs merges several small products of the same input into one: it concatenates their kernels and then splits the
# result. A threshold of 0 prevents this. Decoding would concatenate for every token, which takes twice the time of reading
# the kernels.
_APART: Options = {"xla_gpu_dot_merger_threshold_mb": 0}

# libtpu turns a product with a split kernel into a loop of permutes and partial products. It keeps their sum in the dtype
# of the result, so every trip reads, writes and rounds it to bfloat16. It does so only for products above this many MiB:
# here for none.
# XLA for GPUs combines reduce-scatters into one while the parts that devices keep are below a threshold. With its default,
# 30 MB, all of a layer's gradients wait for the last one, and no work is left to overlap with them.
# In JAX 0.11, XLA for GPUs also makes copies of slices out of and into arrays asynchronous. Its scheduler has no estimate
# for these copies (0.11.2 logs "Unsupported collective instruction: fusion-start") and takes 5,000 for each, whereas an
# exchange counts its microseconds: so it overlaps what it can with copies and leaves exchanges alone. Without that pass the
# copies are kernels again, as in 0.10, which has no such pass and ignores its name.
SEQUENCES: dict[str, Options] = {
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    "gpu": _APART
    | {
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 4 << 20,
        "xla_disable_hlo_passes": "dynamic-slice-copy-fusion-async-wrapper",
    },
}
# For programs that process one token of each sequence.
DECODING: dict[str, Options] = {"gpu": _APART}

# For compiling without a device. XLA finds the tiles of Triton's matrix products by timing them; without a GPU it picks
# some that do not fit every product (JAX 0.10.2). cuBLAS has its own.
WITHOUT_DEVICE: dict[str, Options] = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def sequence_options(mesh: Mesh) -> Options | None:
    """For programs that process whole sequences: training and evaluation."""
    return SEQUENCES.get(mesh.devices.flat[0].platform)
