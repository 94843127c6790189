"""Values wider than one kernel takes are split over several: results do not change, and nothing is lost."""

import numpy as np
import pytest

from jaxlinear.ops import matrix_states
from tests.pallas import kernel_cases


@pytest.mark.parametrize("operation", ["linear_attention", "delta_rule"])
def test_two_kernels_share_the_values(operation, short_chunks, monkeypatch):
    monkeypatch.setattr(matrix_states, "WIDEST", 8)
    assert matrix_states.value_pieces(16, 8) == 2
    inputs = kernel_cases.draw(operation, np.random.default_rng(0), "channel", 20, 2, 8, 16, batch=2)
    ids = kernel_cases.ids_of(7, 6, 7).repeat(2, axis=0)
    kernel_cases.assert_as_the_recurrence(operation, inputs, segment_ids=ids)


@pytest.mark.parametrize("width, pieces", [(16, 1), (512, 1), (400, 1), (521, None), (1024, 2), (1280, 4), (1536, 3)])
def test_pieces(width, pieces):
    assert matrix_states.value_pieces(width, 2) == pieces
    if width < 512:
        assert matrix_states.value_pieces(2 * width, 4) == matrix_states.value_pieces(4 * width, 2)
