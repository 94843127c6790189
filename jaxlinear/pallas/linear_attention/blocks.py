"""Sizes of the blocks of linear attention, by JAX's name for the device. Those for TPU are the best of
``benchmarks/tpu_chunks.py --tune``, by static schedules; nothing was timed."""

from typing import NamedTuple

from jaxlinear.pallas.parts.memory import VMEM_BYTES, array_bytes, even_groups, gradients_by_channel
from jaxlinear.pallas.parts.target import GPU


class Block(NamedTuple):
    time: int  # tokens of a block, a multiple of the chunk
    chunk: int  # tokens of a chunk, a power of two; at least 128 in compiled kernels
    lanes: int  # channels of the heads of a block, approximately; in the gradient half of them


# For linear attention: without a decay or with one per head, and with one per channel. Among the blocks within 7% of the
# best at K = V = 128 with 16 heads, those that keep the fewest states.
TPU: dict[str, tuple[Block, Block]] = {
    "TPU v5 lite": (Block(512, 128, 512), Block(512, 128, 1024)),
    "TPU v5": (Block(512, 128, 512), Block(512, 128, 1024)),
    "TPU v6 lite": (Block(1024, 256, 512), Block(512, 128, 1024)),  # its matrix unit is 256 x 256
    "TPU7x": (Block(512, 128, 512), Block(512, 128, 1024)),
}
_TPU_ELSEWHERE = Block(512, 128, 512), Block(512, 128, 1024)
CHUNKS = {"tpu": (128, 128), "gpu": (16, 64)}  # the smallest and the largest that may be requested
CHUNKS_INTERPRETED = 8, 256
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


def tpu(
    kind: str, length: int, heads: int, widths: tuple[int, ...], by_channel: bool, chunk: int | None, size: int
) -> tuple[int, int, tuple[int, int]]:
    """Tokens of a block and of a chunk; and heads of a block, and of one of the gradient, whose tokens are as many.
    ``widths``: K and V; or only V if all heads share queries and keys, and then as many heads as possible, in the gradient
    too. ``chunk``: the one to use, or None. ``size``: bytes per number."""
    table = TPU.get(kind, _TPU_ELSEWHERE)
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
_SPILLED = 5.7e6


def together(heads: int, time: int, chunk: int, keys: int, values: int, size: int) -> int:
    """Heads of a block that the gradient with decays by key channel processes at once, one group after another: as many as
    there is room for in VMEM, in groups as even as possible."""
    if size == 2 or keys <= 128:
        return heads
    left = VMEM_BYTES - array_bytes(heads, time, keys, values, size, True)
    return even_groups(heads, max(1, int(left * chunk / time / _SPILLED)))


class GPUBlock(NamedTuple):
    chunk: int  # tokens, a power of two from 16
    keys: int  # channels of a tile
    values: int
    states: int  # values in the tile of states that a program carries through time
    outputs: int  # channels of a program's outputs: a multiple of a tile
    gradients: int  # channels of queries and keys whose gradients a program has
    gradient_values: int  # channels of a tile of values there


def gpu(
    length: int,
    keys: int,
    decay: str,
    packed: bool,
    chunk: int | None,
    gpu: GPU | None,
    shared_by: int | None = None,
) -> GPUBlock:
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
        return GPUBlock(tokens, 32, 64, 128, 128, gradients_by_channel(keys), 64)
    if shared_by:
        return GPUBlock(tokens, 64, 64, 64, 128, 64 if shared_by >= 64 else 16, 32)
    if tokens > 64:
        return GPUBlock(tokens, 64, 64, 64, 64, 32, 32)
    return GPUBlock(tokens, 64, 64, 64, 128, 64, 128)


# Heads that share queries and keys and whose gradients one program sums, one after another: more heads mean fewer sums to
# write and read, but fewer programs.
GPU_SHARED_HEADS = 8
