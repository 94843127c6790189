"""Decoding as compiled for GPUs and TPUs: parameters are read once per token, and none is written."""

import importlib.util
import re
from pathlib import Path

import pytest

from jaxlinear.models import ModelConfig

pytestmark = pytest.mark.usefixtures("optimised")

ROWS, WIDTH, SLOTS = 4, 256, 128

_PATH = Path(__file__).parents[1] / "benchmarks" / "decode_compiled.py"
_SPEC = importlib.util.spec_from_file_location("decode_compiled", _PATH)
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)


SIZES = {"vocab_size": 512, "width": WIDTH, "recurrent_width": WIDTH, "num_heads": 2, "dtype": "bfloat16"}


def decoding(target, pattern, rows=ROWS, **changes):
    """``_decode`` compiled for the first device of a target."""
    config = ModelConfig(pattern=pattern, num_layers=len(pattern), window=SLOTS, **SIZES, **changes)
    return benchmark.compile_for(target, config, rows, SLOTS)


@pytest.mark.parametrize("target", ["h100:1", "v5e:2x2"])
def test_kernels_are_read_as_they_lie(target):
    """No kernel appears in float32, and none is concatenated with another."""
    text = decoding(target, ("rg_lru",)).text
    shapes = set(re.findall(r"\b(?:bf16|f32)\[[\d,]+\]", text))
    assert f"bf16[{WIDTH},{3 * WIDTH}]" in shapes and f"bf16[512,{WIDTH}]" in shapes
    assert not shapes & {f"f32[{WIDTH},{3 * WIDTH}]", f"f32[{WIDTH},{WIDTH}]", f"f32[512,{WIDTH}]"}
    assert not shapes & {f"bf16[{WIDTH},{6 * WIDTH}]", f"bf16[{WIDTH},{2 * WIDTH}]"}


def test_slots_on_a_tpu_are_written_at_once_and_read_by_the_matrix_unit():
    """One conditional per layer, with one branch that has no loop over the rows; nothing of the slots' shape is float32."""
    text = decoding("v5e:2x2", ("sliding_window",), key_value_heads=2).text
    (branches,) = re.findall(r"conditional\(.*branch_computations=\{%([\w.\-]+), %([\w.\-]+)\}", text)
    bodies = [re.search(rf"^%{re.escape(name)} .*?^\}}", text, re.MULTILINE | re.DOTALL).group() for name in branches]
    assert [" while(" in body for body in bodies] == [True, False]
    slots = f"[{ROWS},2,{SLOTS},{WIDTH // 2}]"
    assert f"bf16{slots}" in text and f"f32{slots}" not in text


def test_experts_on_a_gpu_are_no_loops():
    """Each iteration of a loop would wait for the host: the only loop is over the tokens."""
    experts = {"channel_mixer": "mixture_of_experts", "experts": 16, "experts_per_token": 2, "expert_width": WIDTH}
    text = decoding("h100:1", ("gla",), **experts).text
    assert len(re.findall(r" while\(", text)) == 1
    assert f"bf16[16,{WIDTH},{WIDTH}]" in text and f"f32[16,{WIDTH},{WIDTH}]" not in text


def test_states_of_the_delta_rule_on_a_gpu_are_updated_in_place():
    """The fusion that writes a state reads no sum over it, and so may write in place: the state is not copied."""
    text = decoding("h100:1", ("gated_delta_net",), recurrent_heads=2, key_width=96, value_width=160).text
    body = re.search(r" while\(.*body=%([\w.\-]+)", text).group(1)
    lines = re.search(rf"^%{re.escape(body)} .*?^\}}", text, re.MULTILINE | re.DOTALL).group().splitlines()
    states = [line for line in lines if re.search(rf"= f32\[{ROWS},2,(96,160|160,96)\]", line)]
    assert any(" fusion(" in line for line in states)
    assert not any(" copy(" in line for line in states)


def test_what_a_token_moves_is_counted():
    """On a GPU, for a layer with little state: all parameters once, the embedding twice, and little else. A single row
    moves more than twice as much."""
    found = decoding("h100:1", ("rg_lru",))
    moved, cycles = benchmark.token_bytes(found.text)
    embedding = 2 * 512 * WIDTH
    assert found.parameters + embedding < moved < 1.15 * (found.parameters + embedding)
    assert cycles is None
    alone, _ = benchmark.token_bytes(decoding("h100:1", ("rg_lru",), rows=1).text)
    assert alone > 2 * moved
