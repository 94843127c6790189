"""Sizes of the blocks of the gated RMSNorm. Nothing was timed."""

# The RMSNorm with its gate on TPU: tokens of a block, the most first; its numbers, for which VMEM has room seven times,
# twice each; and tokens that are processed at once. No program tunes these.
TPU_TIME = 512, 256, 128, 64, 32
TPU_NUMBERS = 512 * 1024
TPU_ROWS = 16

# On GPU: tokens of a program, a power of two; numbers that a thread has of an array, about; channels that it has of a piece
# of a head; and the most channels of a head, those of 8 warps: with more, threads have half the registers. No GPU has timed
# these.
GPU_TIME = 32
GPU_NUMBERS = 20
GPU_PIECE = 4
GPU_HEAD = 5120
