"""Sizes of the blocks of the short convolution. Nothing was timed."""

# The short convolution on TPU: tokens of a block, the most first; its channels, at most so many where a divisor allows it;
# its numbers, for which VMEM has room; and tokens that are processed at once. No program tunes these.
TPU_TIME = 512, 256, 128
TPU_CHANNELS = 2048
TPU_NUMBERS = 512 * 2048
TPU_ROWS = 64

# On GPU: tokens of a program; its channels, if no head gets unit length; channels times taps of a warp, for which it has
# registers; and tokens that are processed at once, forward and backward. No GPU has timed these.
GPU_TIME = 128
GPU_CHANNELS = 128
GPU_WEIGHTS = 512
GPU_ROWS = 8, 4
