"""The operations are tested without implicit promotion of dtypes or ranks."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
