"""Options for XLA's compilers, by platform: ``jax.jit``'s ``compiler_options``."""

from jax.sharding import Mesh

Options = dict[str, int | bool | str]

# Of several small products of the same input XLA for GPUs makes one, for which it puts their kernels together, and then
# cuts the results apart; not with a threshold of 0. Decoding would do so for every token, which takes twice the time of
# reading the kernels.
_APART: Options = {"xla_gpu_dot_merger_threshold_mb": 0}

# Of a product with a split kernel libtpu makes a loop of permutes and of products of a part each. It keeps their sum in the
# dtype of the result, so it reads, writes and rounds it to bfloat16 in every trip. It does so of products above so many MiB
# alone: here of none. Of sums that devices keep a part of XLA for GPUs makes one while these parts are below a threshold.
# By its own, 30 MB, all of a layer's gradients wait for the last one, and nothing is left to go on beside it. XLA for GPUs
# of JAX 0.11 also makes asynchronous what copies slices out of an array and into it. Its scheduler has no estimate of these
# copies (0.11.2 logs "Unsupported collective instruction: fusion-start") and takes 5,000 for each, where an exchange has
# its microseconds: so it puts what it can beside copies, and leaves exchanges alone. Without that pass they are kernels
# again, as with 0.10, which has no such pass and ignores its name.
SEQUENCES: dict[str, Options] = {
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    "gpu": _APART
    | {
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 4 << 20,
        "xla_disable_hlo_passes": "dynamic-slice-copy-fusion-async-wrapper",
    },
}
# Of programs that take a token of each sequence.
DECODING: dict[str, Options] = {"gpu": _APART}

# For want of a device. XLA finds the tiles of Triton's matrix products by timing them; without a GPU it takes some that do
# not fit every product (JAX 0.10.2). cuBLAS has its own.
WITHOUT_DEVICE: dict[str, Options] = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def of_sequences(mesh: Mesh) -> Options | None:
    """For programs that process whole sequences: training and evaluation."""
    return SEQUENCES.get(mesh.devices.flat[0].platform)
