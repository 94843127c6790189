"""Sizes of the blocks of the RG-LRU. Nothing was timed."""

# The RG-LRU on TPU: tokens of a block, the most first; its channels, fewer than twice as many where the blocks of W allow;
# tokens whose gates are processed at once, and those of a group of the scan; and the bytes of VMEM that arrays may take, so
# that there is room for registers that are spilled. No program tunes these.
TIME = 512, 256, 128
CHANNELS = 1024
CORES = {"TPU v4": 2, "TPU v5": 2}  # of a device, which share the blocks of channels; elsewhere there is one
ROWS = 128
SCAN_ROWS = 32
BYTES = 54 * 2**20

# On GPU: channels of a program, one warp; tokens that are requested at once, forward and backward; how many programs occupy
# a GPU, and tokens of a program if there would be fewer. No GPU has timed these.
GPU_CHANNELS = 32
GPU_ROWS = 16, 8
GPU_PROGRAMS = 512
GPU_TIME = 512
