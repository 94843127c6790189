"""Block sizes of the kernels, by JAX's name for the device. Those for TPU are the best of ``--tune`` of
``benchmarks/tpu_kernels.py`` and, for kernels with chunks, ``tpu_chunks.py``, by static schedules; nothing was timed."""

from typing import NamedTuple

from jaxlinear.pallas.target import GPU


class ScanBlock(NamedTuple):
    time: int  # steps of a block, a multiple of 128
    width: int  # channels of a block, a multiple of 128; half as many for complex numbers
    rows: int  # steps per iteration, a multiple of 16


SCAN_TPU = {
    "TPU v5 lite": ScanBlock(512, 512, 32),
    "TPU v5": ScanBlock(512, 512, 32),
    "TPU v6 lite": ScanBlock(512, 512, 32),
    "TPU7x": ScanBlock(512, 512, 32),
}
_SCAN_TPU_ELSEWHERE = ScanBlock(256, 512, 32)

# 32-bit registers (of 255) that a thread may use for loaded time steps; equally many are in flight for the next ones.
_SCAN_GPU_REGISTERS = 72
SCAN_GPU_CHANNELS = 32  # of a program: one warp, one thread per channel


def scan_tpu(kind: str, length: int, width: int, parts: int) -> ScanBlock:
    """The block of the scan ``[length, width]``; ``parts``: 2 for complex numbers."""
    time, lanes, rows = SCAN_TPU.get(kind, _SCAN_TPU_ELSEWHERE)
    lanes = max(128, lanes // parts)
    time = min(time, -(-length // 128) * 128)
    if width <= lanes:
        return ScanBlock(time, width, rows)
    tiles, most = -(-width // 128), lanes // 128
    blocks = -(-tiles // most)  # as few blocks as possible, as even as possible
    return ScanBlock(time, -(-tiles // blocks) * 128, rows)


def scan_gpu_rows(arrays: int) -> int:
    """Time steps that a thread loads at once from ``arrays`` arrays: a power of two."""
    return 1 << ((_SCAN_GPU_REGISTERS // arrays).bit_length() - 1)


# On TPU: tokens of a group, processed in one iteration, a multiple of 8; and the most state numbers per token in a block of
# channels, and the most in the columns of a block of time, except that neither block has fewer than 128 or more than 512
# channels or tokens.
SELECTIVE_SCAN_ROWS = 32
_SELECTIVE_SCAN_NUMBERS = 8192


def selective_scan_tpu(length: int, states: int, width: int) -> tuple[int, int]:
    """Tokens and channels of a block of the selective scan, for N = ``states``. ``width``: all channels, a multiple of 128,
    which are divided equally among the blocks."""
    most = _selective_scan_most(states)
    tiles = width // 128
    time = min(most, -(-length // 128))
    return 128 * time, 128 * next(n for n in range(min(tiles, most), 0, -1) if tiles % n == 0)


def _selective_scan_most(states: int) -> int:
    """Times 128."""
    return max(1, min(4, _SELECTIVE_SCAN_NUMBERS // states // 128))


def selective_scan_tpu_channels(states: int) -> int:
    """How many channels VMEM has room for. Each needs, twice, the state before and after and the gradient of A, and A once;
    the largest block's memory is added, including spilled registers. Compiled programs took as much where two rows of a
    batch overlap, and less with one row."""
    states += -states % 8
    most = 128 * _selective_scan_most(states)
    columns, again, before, spilled = 2 * most * 128, 129 * most, 2 * most // 128 * most, 70 * most
    numbers = states * (columns + again + before + 8 * most + spilled) + (3 * 128 + 10 * most) * most
    return max(0, VMEM_BYTES // 4 - numbers) // (7 * states) // 128 * 128


# The RG-LRU on TPU: tokens of a block, the most first; its channels, fewer than twice as many where the blocks of W allow;
# tokens whose gates are processed at once, and those of a group of the scan; and the bytes of VMEM that arrays may take, so
# that there is room for registers that are spilled. No program tunes these.
RG_LRU_TPU = 512, 256, 128
RG_LRU_CHANNELS = 1024
RG_LRU_CORES = {"TPU v4": 2, "TPU v5": 2}  # of a device, which share the blocks of channels; elsewhere there is one
RG_LRU_ROWS = 128
RG_LRU_SCAN_ROWS = 32
RG_LRU_BYTES = 54 * 2**20

# On GPU: channels of a program, one warp; tokens that are requested at once, forward and backward; how many programs occupy
# a GPU, and tokens of a program if there would be fewer. No GPU has timed these.
RG_LRU_GPU_CHANNELS = 32
RG_LRU_GPU_ROWS = 16, 8
RG_LRU_GPU_PROGRAMS = 512
RG_LRU_GPU_TIME = 512


class SelectiveScanGPUBlock(NamedTuple):
    channels: int  # of a lane of a warp; 8 lanes divide the channels
    numbers: int  # of each channel's state, in a lane; 4 lanes divide them
    rows: int  # tokens processed at once
    kept: int  # tokens between the states that the forward pass keeps, a multiple of ``rows``
    again: tuple[str, ...]  # fields of a token that are loaded again, for lack of registers


def selective_scan_gpu(states: int) -> SelectiveScanGPUBlock:
    """``states``: N. The forward pass keeps about two numbers per token and channel. With another number of channels per
    lane, or with fewer rows, a token takes more instructions, as counted in the PTX; with more rows, registers spill. No
    GPU has timed them."""
    rounded = max(4, 1 << (states - 1).bit_length())
    again = ("dt", "x", "C") if rounded >= 16 else ("dt",)
    return SelectiveScanGPUBlock(4, min(4, rounded // 4), 4, max(8, rounded // 2), again)


class AttentionBlock(NamedTuple):
    time: int  # tokens of a block, a multiple of the chunk
    chunk: int  # tokens of a chunk, a power of two; at least 128 in compiled kernels
    lanes: int  # channels of the heads of a block, approximately; in the gradient half of them


# For linear attention: without a decay or with one per head, and with one per channel. Among the blocks within 7% of the
# best at K = V = 128 with 16 heads, those that keep the fewest states.
LINEAR_ATTENTION_TPU: dict[str, tuple[AttentionBlock, AttentionBlock]] = {
    "TPU v5 lite": (AttentionBlock(512, 128, 512), AttentionBlock(512, 128, 1024)),
    "TPU v5": (AttentionBlock(512, 128, 512), AttentionBlock(512, 128, 1024)),
    "TPU v6 lite": (AttentionBlock(1024, 256, 512), AttentionBlock(512, 128, 1024)),  # its matrix unit is 256 x 256
    "TPU7x": (AttentionBlock(512, 128, 512), AttentionBlock(512, 128, 1024)),
}
_LINEAR_ATTENTION_TPU_ELSEWHERE = AttentionBlock(512, 128, 512), AttentionBlock(512, 128, 1024)
CHUNKS = {"tpu": (128, 128), "gpu": (16, 64)}  # the smallest and the largest that may be requested
CHUNKS_INTERPRETED = 8, 256
VMEM_BYTES = 64 * 2**20  # that a kernel with chunks may use
# Chunks of heads of a block, unrolled; half as many of heads with few channels, whose gradient would take up to 5% longer.
_WRITTEN_OUT = 16
# Lanes of the registers of these together and, in float32, of the heads of the gradient's blocks with chunks of 256 tokens:
# more would not fit VMEM.
_LANES_WRITTEN_OUT = 2048
_LANES_OF_256_TOKENS = 1024
HEADS = 8  # most heads of a block, which are unrolled


def heads_of_block(heads: int, widths: tuple[int, ...], lanes: int) -> int | None:
    """As few heads as fill whole registers of 128 lanes with each width, or as many of these as fit ``lanes``; or all. None
    if more than ``HEADS`` would have to be in one block."""
    least = next(n for n in range(1, 129) if all(n * width % 128 == 0 for width in widths))
    most = max(least, lanes // max(widths) // least * least)
    count = next((n for n in range(min(most, HEADS) // least * least, 0, -least) if heads % n == 0), least)
    count = min(count, heads)
    return count if count <= HEADS else None


def linear_attention_tpu(
    kind: str, length: int, heads: int, widths: tuple[int, ...], by_channel: bool, chunk: int | None, size: int
) -> tuple[int, int, tuple[int, int]]:
    """Tokens of a block and of a chunk; and heads of a block, and of one of the gradient, whose tokens are as many.
    ``widths``: K and V; or only V if all heads share queries and keys, and then as many heads as possible, in the gradient
    too. ``chunk``: the one to use, or None. ``size``: bytes per number."""
    table = LINEAR_ATTENTION_TPU.get(kind, _LINEAR_ATTENTION_TPU_ELSEWHERE)
    block = table[by_channel]
    both = (HEADS * max(widths),) * 2 if len(widths) == 1 else (block.lanes, block.lanes // 2)
    together, in_gradient = (heads_of_block(heads, widths, lanes) for lanes in both)
    assert together is not None and in_gradient is not None
    few, lanes = max(widths) < 64, -(-max(widths) // 128) * 128
    if chunk is None:
        most = 128 if size > 2 and lanes * in_gradient > _LANES_OF_256_TOKENS else block.chunk
        chunk = min(most, max(128, 1 << (length - 1).bit_length()))
    written_out = min(_WRITTEN_OUT // 2 if few else _WRITTEN_OUT, _LANES_WRITTEN_OUT // lanes)
    chunks = max(1, min(block.time // chunk, written_out // together))
    return min(chunks, -(-length // chunk)) * chunk, chunk, (together, in_gradient)


# VMEM bytes that the gradient takes for each chunk of a head with decays by key channel, in float32 and for K above 128:
# compiled kernels took 5.0e6 to 5.6e6. All others that were compiled fit.
_LINEAR_ATTENTION_SPILLED = 5.7e6


def linear_attention_together(heads: int, time: int, chunk: int, keys: int, values: int, size: int) -> int:
    """Heads of a block that the gradient with decays by key channel processes at once, one group after another: as many as
    there is room for in VMEM, in groups as even as possible."""
    if size == 2 or keys <= 128:
        return heads
    left = VMEM_BYTES - _blocks_bytes(heads, time, keys, values, size, True)
    return _even_groups(heads, max(1, int(left * chunk / time / _LINEAR_ATTENTION_SPILLED)))


def _blocks_bytes(
    heads: int, time: int, keys: int, values: int, size: int, by_channel: bool, is_gradient: bool = True
) -> int:
    """What the arrays of a kernel take in VMEM, in two blocks each: those of q, k, v, o, decays and, in the gradient, their
    gradients; and three arrays of states."""
    of_keys, of_values = (-(-heads * width // 128) * 128 for width in (keys, values))
    both = 2 if is_gradient else 1
    tokens = time * (both * (2 * size + 4 * by_channel) * of_keys + (1 + both) * size * of_values)
    return 2 * (tokens + heads * values * -(-keys // 128) * 128 * (size + 8))


def _even_groups(heads: int, most: int) -> int:
    """Heads of a group, but for the last, if each may have ``most``."""
    return -(-heads // -(-heads // most))


class AttentionGPUBlock(NamedTuple):
    chunk: int  # tokens, a power of two from 16
    keys: int  # channels of a tile
    values: int
    states: int  # values in the tile of states that a program carries through time
    outputs: int  # channels of a program's outputs: a multiple of a tile
    gradients: int  # channels of queries and keys whose gradients a program has
    gradient_values: int  # channels of a tile of values there


def linear_attention_gpu(
    length: int,
    keys: int,
    decay: str,
    packed: bool,
    chunk: int | None,
    gpu: GPU | None,
    shared_by: int | None = None,
) -> AttentionGPUBlock:
    """The largest sizes with which no program spills registers: with fewer tokens or channels, a token takes more
    instructions, as counted in the PTX. No GPU has timed them. ``shared_by``: V of the heads that share queries and keys,
    if they do."""
    by_channel = decay == "channel"
    if chunk is None:
        # With few keys, with T ending within a chunk, with decays per token and documents, or with gradients summed over
        # heads, chunks of 128 would spill, so ``CHUNKS`` does not let users request them.
        whole = keys >= 64 and length % 128 == 0 and not (decay == "scalar" and packed) and not shared_by
        few = by_channel or (keys >= 128 and gpu is not None and not gpu.warpgroups)
        chunk = 32 if few else 128 if whole else 64
    tokens = min(chunk, max(32, 1 << (length - 1).bit_length()))  # 16 would spill at K = V = 64
    if by_channel:
        return AttentionGPUBlock(tokens, 32, 64, 128, 128, _gradients_by_channel(keys), 64)
    if shared_by:
        return AttentionGPUBlock(tokens, 64, 64, 64, 128, 64 if shared_by >= 64 else 16, 32)
    if tokens > 64:
        return AttentionGPUBlock(tokens, 64, 64, 64, 64, 32, 32)
    return AttentionGPUBlock(tokens, 64, 64, 64, 128, 64, 128)


# Heads that share queries and keys and whose gradients one program sums, one after another: more heads mean fewer sums to
# write and read, but fewer programs.
GPU_SHARED_HEADS = 8


def _gradients_by_channel(keys: int) -> int:
    return 64 if keys >= 64 else 16  # 32 spills, for whatever reason


class DeltaRuleBlock(NamedTuple):
    chunk: int  # tokens, a power of two from 16
    chunk_by_channel: int  # with a decay by key channel
    lanes: int  # channels of the heads of a block, approximately; half of them except in the forward pass


DELTA_RULE_TPU = {
    "TPU v5 lite": DeltaRuleBlock(128, 128, 2048),
    "TPU v5": DeltaRuleBlock(128, 128, 2048),
    "TPU v6 lite": DeltaRuleBlock(128, 128, 2048),
}
_DELTA_RULE_TPU_ELSEWHERE = DeltaRuleBlock(128, 128, 2048)


DELTA_RULE_HEADS = 16  # most heads of a block: they are unrolled


def delta_rule_chunk(kind: str, length: int, by_channel: bool, chunk: int | None) -> int:
    """Tokens of a chunk of the delta rule: the given number or the table's, but no more than needed to hold T."""
    block = DELTA_RULE_TPU.get(kind, _DELTA_RULE_TPU_ELSEWHERE)
    if chunk is None:
        chunk = block.chunk_by_channel if by_channel else block.chunk
    return min(chunk, max(16, 1 << (length - 1).bit_length()))


def delta_rule_heads(kind: str, heads: int, keys: int, values: int, forward: bool = False) -> int:
    """Heads of a block, of the forward pass or of the other kernels: all, or enough that their K and V fill whole registers
    of 128 lanes; the last block may have fewer."""
    least = next(n for n in range(1, 129) if n * keys % 128 == n * values % 128 == 0)
    lanes = DELTA_RULE_TPU.get(kind, _DELTA_RULE_TPU_ELSEWHERE).lanes // (1 if forward else 2)
    width = max(keys, values, 128)  # with fewer channels, too, a head's tokens and state fill registers
    most = max(least, min(lanes // width, DELTA_RULE_HEADS) // least * least)
    if heads <= most:
        return heads
    groups = -(-heads // most)  # as few as possible, as even as possible
    return -(-heads // groups // least) * least


# VMEM bytes of the gradient kernel per head that it processes at once, by bytes per number and whether decays are by key
# channel: for each register of 128 channels of K, and of V. Nearly all of it holds registers that are spilled. And of the
# other kernels, per head: as much as any forward pass took; summaries and gradients of the state took less.
_DELTA_RULE_SPILLED = {
    (2, False): (0.8e6, 0.45e6),
    (2, True): (2.2e6, 0.4e6),
    (4, False): (1.45e6, 1.45e6),
    (4, True): (4.95e6, 1.25e6),
}
_DELTA_RULE_SPILLED_ELSEWHERE = 2.0e6


class DeltaRuleHeads(NamedTuple):
    """A block of heads in the delta rule's gradient kernel, or in another one, which has room for more of them."""

    heads: int
    keys: int  # K
    values: int  # V
    size: int  # bytes per number
    by_channel: bool  # decays
    terms: int = 1  # of the inverse, as the plan has them
    is_gradient: bool = True

    def vmem(self, together: int) -> int:
        """The bytes of VMEM with ``together`` heads processed at once: compiled gradients and forward passes took no more,
        and gradients at least half."""
        spilled = _DELTA_RULE_SPILLED_ELSEWHERE
        if self.is_gradient:
            by_keys, by_values = _DELTA_RULE_SPILLED[min(self.size, 4), self.by_channel]
            spilled = by_keys * -(-self.keys // 128) + by_values * -(-self.values // 128)
        spilled *= (9 + self.terms) / 10  # two terms add at most a tenth
        arrays = _blocks_bytes(self.heads, 128, self.keys, self.values, self.size, self.by_channel, self.is_gradient)
        return arrays + int(together * spilled)

    def together(self) -> int:
        """How many are processed at once, one group after another: as many as there is room for in VMEM, in groups as even
        as possible. 0 if there is no room for one."""
        most = next((count for count in range(self.heads, 0, -1) if self.vmem(count) <= VMEM_BYTES), 0)
        return most and _even_groups(self.heads, most)


class DeltaRuleGPUBlock(NamedTuple):
    chunk: int  # tokens, a power of two from 16
    keys: int  # channels of a tile of K and of V, where a program has a chunk
    values: int
    states: int  # rows of the state, where a program goes through time
    gradients: int  # channels of K whose gradients a program has
    gradient_values: int  # channels of V of a tile in the program for those of values, which holds the inverse


def delta_rule_gpu_chunk(keys: int, gpu: GPU | None, terms: int) -> int:
    """The most tokens of a chunk. With K = 256, chunks of 64 take 114 KiB of shared memory and, with the inverse in two
    terms, more registers than there are."""
    return 64 if keys <= 128 or (terms == 1 and (gpu is None or gpu.ample)) else 32


def delta_rule_gpu(
    length: int, keys: int, by_channel: bool, chunk: int | None, gpu: GPU | None, terms: int
) -> DeltaRuleGPUBlock:
    """As ``linear_attention_gpu``."""
    if chunk is None:
        large = keys >= 64 and not by_channel and (gpu is None or gpu.warpgroups)
        chunk = min(64 if large else 32, delta_rule_gpu_chunk(keys, gpu, terms))
    tokens = min(chunk, max(16, 1 << (length - 1).bit_length()))
    if by_channel:
        values, states = (64, 32) if keys <= 128 else (16, 16)
        gradient_values = min(values, 32) if terms > 1 else values
        return DeltaRuleGPUBlock(tokens, 32, values, states, _gradients_by_channel(keys), gradient_values)
    if keys <= 128:
        tile = max(16, min(64, keys // 2))
        states = 16 if length <= 4 * tokens else 32  # a loop of few steps is unrolled
        return DeltaRuleGPUBlock(tokens, tile, 64, states, tile, 16 if terms > 1 else 64)
    tile = 64 if terms == 1 else 32
    return DeltaRuleGPUBlock(tokens, tile, 32, 16, tile, 32)


# For softmax attention: tokens of a block, and the cycles of all passes for 128 queries and 128 keys in such blocks
# (benchmarks/tpu_attention.py); those in float32 are v5e's.
SOFTMAX_TPU = {
    "TPU v5 lite": {512: 387, 1024: 321},
    "TPU v5": {512: 347, 1024: 277},
    "TPU v6 lite": {512: 306, 1024: 244},
}
_SOFTMAX_TPU_ELSEWHERE = {512: 1}
_SOFTMAX_TPU_FLOAT32 = {256: 1959, 512: 1789}
SOFTMAX_TPU_KEYS = 512  # of a block, processed at once
# The most channels of a head that fit the 16 MiB of VMEM that JAX's kernels may use on v5e and v5p; and, by bytes per
# number, the most in blocks of so many tokens that are not the smallest.
SOFTMAX_TPU_CHANNELS = 512
_SOFTMAX_TPU_WIDEST = {2: {1024: 256}, 4: {512: 192}}


def softmax_tpu(kind: str, length: int, window: int, channels: int, size: int) -> int:
    """Tokens of a block of softmax attention, a multiple of 128, chosen so that visiting the blocks that have pairs of
    queries and keys within the window takes the fewest cycles. ``channels``: of a head; ``size``: bytes per number."""
    widest = _SOFTMAX_TPU_WIDEST[min(size, 4)]
    table = SOFTMAX_TPU.get(kind, _SOFTMAX_TPU_ELSEWHERE) if size == 2 else _SOFTMAX_TPU_FLOAT32

    def cycles(tokens: int) -> int:
        most = -(-(window - 1) // tokens) + 1
        return table[tokens] * tokens**2 * sum(min(n + 1, most) for n in range(-(-length // tokens)))

    smallest = min(table)
    there = [tokens for tokens in table if tokens == smallest or (tokens <= length and channels <= widest[tokens])]
    return min(min(there, key=cycles), -(-length // 128) * 128)


class SoftmaxGPUBlock(NamedTuple):
    queries: int  # of a block, a power of two
    keys: int
    warps: int
    stages: int  # of loads in flight


def attention_gpu(width: int, gpu: GPU | None) -> SoftmaxGPUBlock:
    """For softmax attention with heads of ``width`` channels, a power of two. Not tuned: the largest with which no program
    spills registers, and for whose loads there is room."""
    if width <= 64:
        return SoftmaxGPUBlock(128, 64, 8, 3)
    if gpu is None or (gpu.warpgroups and not gpu.blackwell):
        return SoftmaxGPUBlock(128, 64, 8, 2) if width <= 128 else SoftmaxGPUBlock(64, 32, 8, 2)
    if gpu.warpgroups:  # Blackwell's products keep more of their operands in shared memory
        return SoftmaxGPUBlock(64, 64, 4, 2) if width <= 128 else SoftmaxGPUBlock(64, 64, 8, 1)
    if width <= 128:
        return SoftmaxGPUBlock(64, 64, 8, 2) if gpu.ample else SoftmaxGPUBlock(64, 32, 4, 2)
    return SoftmaxGPUBlock(32, 32, 4, 1)


# The short convolution on TPU: tokens of a block, the most first; its channels, at most so many where a divisor allows it;
# its numbers, for which VMEM has room; and tokens that are processed at once. No program tunes these.
CONVOLUTION_TIME = 512, 256, 128
CONVOLUTION_CHANNELS = 2048
CONVOLUTION_NUMBERS = 512 * 2048
CONVOLUTION_ROWS = 64

# On GPU: tokens of a program; its channels, if no head gets unit length; channels times taps of a warp, for which it has
# registers; and tokens that are processed at once, forward and backward. No GPU has timed these.
CONVOLUTION_GPU_TIME = 128
CONVOLUTION_GPU_CHANNELS = 128
CONVOLUTION_GPU_WEIGHTS = 512
CONVOLUTION_GPU_ROWS = 8, 4

# The RMSNorm with its gate on TPU: tokens of a block, the most first; its numbers, for which VMEM has room seven times,
# twice each; and tokens that are processed at once. No program tunes these.
GATED_NORM_TPU_TIME = 512, 256, 128, 64, 32
GATED_NORM_TPU_NUMBERS = 512 * 1024
GATED_NORM_TPU_ROWS = 16

# On GPU: tokens of a program, a power of two; numbers that a thread has of an array, about; channels that it has of a piece
# of a head; and the most channels of a head, those of 8 warps: with more, threads have half the registers. No GPU has timed
# these.
GATED_NORM_GPU_TIME = 32
GATED_NORM_GPU_NUMBERS = 20
GATED_NORM_GPU_PIECE = 4
GATED_NORM_GPU_HEAD = 5120
