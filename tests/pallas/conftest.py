"""Kernels are tested without implicit promotion of dtypes or ranks, in small blocks, so short sequences have several."""

import jax
import pytest

from jaxlinear.pallas import blocks


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def short_chunks(monkeypatch):
    """16 tokens, as few heads at a time as fill registers: programs are small and compile fast."""
    monkeypatch.setattr(blocks, "_LINEAR_ATTENTION_TPU_ELSEWHERE", (blocks.AttentionBlock(16, 16, 1),) * 2)
    monkeypatch.setattr(blocks, "_DELTA_RULE_TPU_ELSEWHERE", blocks.DeltaRuleBlock(16, 16, 1))


@pytest.fixture
def small_blocks(monkeypatch):
    """128 time steps x 128 channels, 16 steps at a time; on GPU, 8 steps of a and x at a time. In the selective scan, 8
    tokens at a time."""
    monkeypatch.setattr(blocks, "_SCAN_TPU_ELSEWHERE", blocks.ScanBlock(128, 128, 16))
    monkeypatch.setattr(blocks, "_SCAN_GPU_REGISTERS", 16)
    monkeypatch.setattr(blocks, "SELECTIVE_SCAN_ROWS", 8)
    monkeypatch.setattr(blocks, "_SELECTIVE_SCAN_NUMBERS", 1024)
