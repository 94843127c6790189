"""How a model's layers are cut into stacks: for the presets, for short patterns, and for any."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlinear.models import presets
from jaxlinear.models.stacks import BLOCKS_AT_ONCE, Stack, _split, place, split

RECURRENT, LOCAL = "rg_lru", "sliding_window"


def layers(stacks):
    return tuple(itertools.chain.from_iterable(stack.pattern * stack.repeats for stack in stacks))


def shown(name):
    """``"xy3 z"``: for each stack, the first letters of its pattern and how often it is repeated."""
    preset = presets.find(name)
    return " ".join(
        "".join(mixer[0] for mixer in stack.pattern) + str(stack.repeats)
        for stack in split(preset["pattern"], preset["num_layers"])
    )


def test_a_short_pattern_is_repeated_as_it_is():
    griffin = (RECURRENT, RECURRENT, LOCAL)
    assert split(griffin, 26) == (Stack(0, griffin, 8), Stack(24, (RECURRENT, RECURRENT), 1))
    assert split(griffin, 3) == (Stack(0, griffin, 1),)
    assert split(griffin, 2) == (Stack(0, (RECURRENT, RECURRENT), 1),)
    assert split(("gla",), 5) == (Stack(0, ("gla",), 5),)


@pytest.mark.parametrize(
    "name, stacks",
    [
        ("delta_net_global_340m", "da1 d10 a1 d11"),
        ("based_360m", "clscc5 c2"),
        ("based_1b3", "clscc5 c2 ls1 c4 lsc1"),
        ("linear_llama3_1b", "llla4"),
        ("samba_421m", "ms6"),
    ],
)
def test_a_preset_is_written_out_no_more_than_it_has_to_be(name, stacks):
    assert shown(name) == stacks


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=14), st.integers(1, 30))
def test_the_stacks_are_the_layers(pattern, num_layers):
    pattern = tuple(pattern)
    stacks = split(pattern, num_layers)
    expected = [pattern[i % len(pattern)] for i in range(num_layers)]
    assert list(layers(stacks)) == expected
    ends = [stack.first + len(stack.pattern) * stack.repeats for stack in stacks]
    assert [stack.first for stack in stacks] == [0, *ends[:-1]] and ends[-1] == num_layers
    found = [place(stacks, layer) for layer in range(num_layers)]
    assert [stacks[at.stack].pattern[at.block] for at in found] == expected
    assert found == sorted(set(found)) and all(at.repeat < stacks[at.stack].repeats for at in found)
    if num_layers >= 2 * len(pattern):
        assert stacks[0] == Stack(0, pattern, num_layers // len(pattern))
    elif len(pattern) > BLOCKS_AT_ONCE:
        assert sum(len(stack.pattern) for stack in stacks) <= num_layers


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("xy"), min_size=1, max_size=7))
def test_no_other_cut_writes_fewer_blocks(names):
    """Compared with all possible cuts."""

    def fewest(names):
        if not names:
            return 0
        costs = []
        for period in range(1, len(names) + 1):
            end = 0
            while names[end : end + period] == names[:period]:
                end += period
                costs.append(period + fewest(names[end:]))
        return min(costs)

    assert sum(len(stack.pattern) for stack in _split(tuple(names), 0)) == fewest(names)
