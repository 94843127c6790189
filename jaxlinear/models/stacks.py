"""How a model's layers are cut into stacks: runs of layers that repeat a pattern, which is written out once."""

from typing import NamedTuple

# The number of blocks that the backward pass recomputes at a time, and the longest pattern that is never cut.
BLOCKS_AT_ONCE = 4


class Stack(NamedTuple):
    """Layers ``first`` to ``first + repeats * len(pattern)``, counted from 0."""

    first: int
    pattern: tuple[str, ...]
    repeats: int


class Place(NamedTuple):
    """Where a layer is: in which stack, in which repetition of its pattern, and at which block of that."""

    stack: int
    repeat: int
    block: int


def split(pattern: tuple[str, ...], num_layers: int) -> tuple[Stack, ...]:
    """The stacks of ``pattern``, repeated to the depth.

    Its whole repetitions are one stack, followed by what is left of the depth. But if a pattern of more than
    ``BLOCKS_AT_ONCE`` names is not repeated, such as one as long as the model, or if more than so many layers are left,
    these layers are cut into the repetitions they contain, so that the fewest blocks are written out, in the fewest stacks.
    """
    period = len(pattern)
    whole, left = divmod(num_layers, period)
    if whole < 2 and period > BLOCKS_AT_ONCE:
        return _split((pattern * 2)[:num_layers], 0)
    stacks = (Stack(0, pattern, whole),) if whole else ()
    if left > BLOCKS_AT_ONCE:
        return stacks + _split(pattern[:left], whole * period)
    return stacks + ((Stack(whole * period, pattern[:left], 1),) if left else ())


def place(stacks: tuple[Stack, ...], layer: int) -> Place:
    """The place of a layer, counted from 0."""
    i = next(i for i, stack in enumerate(stacks) if layer < stack.first + stack.repeats * len(stack.pattern))
    return Place(i, *divmod(layer - stacks[i].first, len(stacks[i].pattern)))


def _split(layers: tuple[str, ...], first: int) -> tuple[Stack, ...]:
    """The cheapest cut of ``layers``, built up from that of each tail, the shortest first."""

    def cost(stacks: tuple[Stack, ...]) -> tuple[int, int]:
        return sum(len(stack.pattern) for stack in stacks), len(stacks)

    best: dict[int, tuple[Stack, ...]] = {len(layers): ()}
    for begin in reversed(range(len(layers))):
        ways = []
        for period in range(1, len(layers) - begin + 1):
            pattern = layers[begin : begin + period]
            end, repeats = begin, 0
            while layers[end : end + period] == pattern:
                end, repeats = end + period, repeats + 1
                ways.append((Stack(first + begin, pattern, repeats), *best[end]))
        best[begin] = min(ways, key=cost)
    return best[0]
