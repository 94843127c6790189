"""Kernels are tested without implicit promotion of dtypes or ranks, in small blocks, so short sequences have several."""

import jax
import pytest

from jaxlinear.pallas.delta_rule import blocks as delta_rule_blocks
from jaxlinear.pallas.linear_attention import blocks as linear_attention_blocks
from jaxlinear.pallas.scan import blocks as scan_blocks
from jaxlinear.pallas.selective_scan import blocks as selective_scan_blocks


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def short_chunks(monkeypatch):
    """16 tokens, as few heads at a time as fill registers: programs are small and compile fast."""
    monkeypatch.setattr(linear_attention_blocks, "_TPU_ELSEWHERE", (linear_attention_blocks.Block(16, 16, 1),) * 2)
    monkeypatch.setattr(delta_rule_blocks, "_TPU_ELSEWHERE", delta_rule_blocks.Block(16, 16, 1))


@pytest.fixture
def small_blocks(monkeypatch):
    """128 time steps x 128 channels, 16 steps at a time; on GPU, 8 steps of a and x at a time. In the selective scan, 8
    tokens at a time."""
    monkeypatch.setattr(scan_blocks, "_TPU_ELSEWHERE", scan_blocks.Block(128, 128, 16))
    monkeypatch.setattr(scan_blocks, "_GPU_REGISTERS", 16)
    monkeypatch.setattr(selective_scan_blocks, "ROWS", 8)
    monkeypatch.setattr(selective_scan_blocks, "_NUMBERS", 1024)
