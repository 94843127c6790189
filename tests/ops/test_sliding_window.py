"""sliding_window_attention: cases for the laws and for the kernels."""

import functools

from tests import numerics
from tests.ops import cases

BACKENDS = ["recurrent", "chunked"]
# name: B, T, H, G, K, V, window, keys in front, segments
CASES = {
    "one_token": (3, 1, 4, 1, 6, 6, 5, 0, True),
    "one_token_after_keys": (1, 1, 4, 1, 6, 4, 5, 4, True),
    "multi_query": (3, 7, 4, 1, 6, 6, 3, 0, True),
    "multi_head": (1, 64, 3, 3, 4, 5, 10, 0, True),
    "grouped": (1, 64, 4, 2, 5, 3, 64, 0, True),
    "one_head": (3, 7, 1, 1, 4, 2, 100, 0, False),
    "fewer_keys_in_front": (3, 7, 2, 1, 4, 4, 6, 2, True),
    "more_keys_in_front": (1, 100, 2, 2, 4, 4, 6, 9, True),
    "window_1": (1, 7, 2, 1, 4, 4, 1, 0, True),
    "long": (1, 257, 2, 1, 4, 4, 70, 0, True),
    "long_window_of_a_block": (1, 257, 2, 1, 4, 3, 129, 3, False),
}


@functools.cache
def case(name):
    length, window = CASES[name][1], CASES[name][6]
    return cases.attention(*CASES[name], chance=0.08, seed=length + window)


RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "grouped", "more_keys_in_front", "long")),
    *(
        (name, dtype, "recurrent")
        for name, dtype in numerics.each_dtype(["one_token", "grouped", "long"], "more_keys_in_front")
    ),
]


def options(name, backend):
    return {"window": CASES[name][6], "backend": backend}
