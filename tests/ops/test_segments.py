"""The representations of document boundaries, written out."""

import numpy as np

from jaxlinear.ops import segments

IDS = np.array([[1, 1, 2, 1, 1], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]], np.int32)


def test_the_representations_of_boundaries():
    assert segments.starts(IDS).astype(int).tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]
    assert segments.ends(IDS).astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert segments.runs(IDS).tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert segments.runs(IDS).dtype == np.int32
    assert segments.first_positions(IDS).tolist() == [[0, 0, 2, 3, 3], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]


def test_one_token_begins_and_ends_nothing():
    one = IDS[:, :1]
    assert not segments.first_positions(one).any()
    assert not segments.starts(one).any() and not segments.ends(one).any() and not segments.runs(one).any()
