"""The operations are tested without implicit promotion of dtypes or ranks."""

import jax
import pytest

from jaxlinear.ops.attention import op as attention


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Gives causal attention of short inputs many blocks, whose sizes divide neither each other nor the length."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    monkeypatch.setattr(attention, "KEY_RUN", 24)
