"""Sizes of the blocks of the delta rule, by JAX's name for the device. Those for TPU are the best of
``benchmarks/tpu_chunks.py --tune``, by static schedules; nothing was timed."""

from typing import NamedTuple

from jaxlinear.pallas.parts.memory import VMEM_BYTES, array_bytes, even_groups, gradients_by_channel
from jaxlinear.pallas.parts.target import GPU


class Block(NamedTuple):
    chunk: int  # tokens, a power of two from 16
    chunk_by_channel: int  # with a decay by key channel
    lanes: int  # channels of the heads of a block, approximately; half of them except in the forward pass


TPU = {
    "TPU v5 lite": Block(128, 128, 2048),
    "TPU v5": Block(128, 128, 2048),
    "TPU v6 lite": Block(128, 128, 2048),
}
_TPU_ELSEWHERE = Block(128, 128, 2048)


HEADS = 16  # most heads of a block: they are unrolled


def chunk_of(kind: str, length: int, by_channel: bool, chunk: int | None) -> int:
    """Tokens of a chunk of the delta rule: the given number or the table's, but no more than needed to hold T."""
    block = TPU.get(kind, _TPU_ELSEWHERE)
    if chunk is None:
        chunk = block.chunk_by_channel if by_channel else block.chunk
    return min(chunk, max(16, 1 << (length - 1).bit_length()))


def heads_of(kind: str, heads: int, keys: int, values: int, forward: bool = False) -> int:
    """Heads of a block, of the forward pass or of the other kernels: all, or enough that their K and V fill whole registers
    of 128 lanes; the last block may have fewer."""
    least = next(n for n in range(1, 129) if n * keys % 128 == n * values % 128 == 0)
    lanes = TPU.get(kind, _TPU_ELSEWHERE).lanes // (1 if forward else 2)
    width = max(keys, values, 128)  # with fewer channels, too, a head's tokens and state fill registers
    most = max(least, min(lanes // width, HEADS) // least * least)
    if heads <= most:
        return heads
    groups = -(-heads // most)  # as few as possible, as even as possible
    return -(-heads // groups // least) * least


# VMEM bytes of the gradient kernel per head that it processes at once, by bytes per number and whether decays are by key
# channel: for each register of 128 channels of K, and of V. Nearly all of it holds registers that are spilled. And of the
# other kernels, per head: as much as any forward pass took; summaries and gradients of the state took less.
_SPILLED = {
    (2, False): (0.8e6, 0.45e6),
    (2, True): (2.2e6, 0.4e6),
    (4, False): (1.45e6, 1.45e6),
    (4, True): (4.95e6, 1.25e6),
}
_SPILLED_ELSEWHERE = 2.0e6


class Heads(NamedTuple):
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
        spilled = _SPILLED_ELSEWHERE
        if self.is_gradient:
            by_keys, by_values = _SPILLED[min(self.size, 4), self.by_channel]
            spilled = by_keys * -(-self.keys // 128) + by_values * -(-self.values // 128)
        spilled *= (9 + self.terms) / 10  # two terms add at most a tenth
        arrays = array_bytes(self.heads, 128, self.keys, self.values, self.size, self.by_channel, self.is_gradient)
        return arrays + int(together * spilled)

    def together(self) -> int:
        """How many are processed at once, one group after another: as many as there is room for in VMEM, in groups as even
        as possible. 0 if there is no room for one."""
        most = next((count for count in range(self.heads, 0, -1) if self.vmem(count) <= VMEM_BYTES), 0)
        return most and even_groups(self.heads, most)


class GPUBlock(NamedTuple):
    chunk: int  # tokens, a power of two from 16
    keys: int  # channels of a tile of K and of V, where a program has a chunk
    values: int
    states: int  # rows of the state, where a program goes through time
    gradients: int  # channels of K whose gradients a program has
    gradient_values: int  # channels of V of a tile in the program for those of values, which holds the inverse


def gpu_chunk(keys: int, gpu: GPU | None, terms: int) -> int:
    """The most tokens of a chunk. With K = 256, chunks of 64 take 114 KiB of shared memory and, with the inverse in two
    terms, more registers than there are."""
    return 64 if keys <= 128 or (terms == 1 and (gpu is None or gpu.ample)) else 32


def gpu(length: int, keys: int, by_channel: bool, chunk: int | None, gpu: GPU | None, terms: int) -> GPUBlock:
    """As ``linear_attention_gpu``."""
    if chunk is None:
        large = keys >= 64 and not by_channel and (gpu is None or gpu.warpgroups)
        chunk = min(64 if large else 32, gpu_chunk(keys, gpu, terms))
    tokens = min(chunk, max(16, 1 << (length - 1).bit_length()))
    if by_channel:
        values, states = (64, 32) if keys <= 128 else (16, 16)
        gradient_values = min(values, 32) if terms > 1 else values
        return GPUBlock(tokens, 32, values, states, gradients_by_channel(keys), gradient_values)
    if keys <= 128:
        tile = max(16, min(64, keys // 2))
        states = 16 if length <= 4 * tokens else 32  # a loop of few steps is unrolled
        return GPUBlock(tokens, tile, 64, states, tile, 16 if terms > 1 else 64)
    tile = 64 if terms == 1 else 32
    return GPUBlock(tokens, tile, 32, 16, tile, 32)
