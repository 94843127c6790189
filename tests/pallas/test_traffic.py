"""What ``benchmarks/layers.py`` counts of a compiled program, for programs written out here."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[2] / "benchmarks" / "traffic.py"
_SPEC = importlib.util.spec_from_file_location("traffic", _PATH)
traffic = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(traffic)

TPU = """HloModule m

ENTRY %main (x: bf16[3,64]) -> f32[64,3] {
  %x = bf16[3,64]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[3,64]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %kernel.1 = (f32[3,64]{1,0:T(8,128)}, /*index=1*/u32[]{:T(128)}) custom-call(%near, %x), custom_call_target="tpu"
  %y = f32[3,64]{1,0:T(8,128)} get-tuple-element(%kernel.1), index=0
  ROOT %turned = f32[64,3]{1,0:T(8,128)} transpose(%y), dimensions={1,0}
}
"""

GPU = """HloModule m

%wrapped (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %t = f32[8,4]{1,0} transpose(%p), dimensions={1,0}
}

%both (p.1: f32[4,8]) -> f32[8,4] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  %n = f32[4,8]{1,0} negate(%p.1)
  ROOT %t.1 = f32[8,4]{1,0} transpose(%n), dimensions={1,0}
}

%part (p.2: f32[4,8]) -> f32[1,8] {
  %p.2 = f32[4,8]{1,0} parameter(0)
  ROOT %s = f32[1,8]{1,0} slice(%p.2), slice={[0:1], [0:8]}
}

ENTRY %main (x: f32[4,8]) -> (f32[8,4], f32[8,4], f32[1,8]) {
  %x = f32[4,8]{1,0} parameter(0)
  %kernel = (f32[4,8]{1,0}, pred[2]{0}) custom-call(%x), custom_call_target="__gpu$xla.gpu.triton"
  %y = f32[4,8]{1,0} get-tuple-element(%kernel), index=0
  %sum-start = f32[4,8]{1,0} all-reduce-start(%y), to_apply=%add
  %turned = f32[8,4]{1,0} fusion(%y), kind=kInput, calls=%wrapped, metadata={op_name="jit(f)/transpose"}
  %turned.1 = f32[8,4]{1,0} fusion(%y), kind=kInput, calls=%both
  %sum-done = f32[4,8]{1,0} all-reduce-done(%sum-start)
  %cut = f32[1,8]{1,0} fusion(%sum-done), kind=kLoop, calls=%part
  %copied = f32[1,8]{1,0} copy(%cut)
  ROOT %all = (f32[8,4]{1,0}, f32[8,4]{1,0}, f32[1,8]{1,0}) tuple(%turned, %turned.1, %copied)
}
"""


def test_on_tpu_whole_tiles_are_moved_and_arrays_in_vmem_are_free():
    narrow, wide, turned = 8 * 128 * 2, 8 * 128 * 4, 64 * 128 * 4
    found = {item["name"]: (item["bytes"], item["rewrites"]) for item in traffic.on_tpu(TPU)}
    assert found == {
        "near": (narrow, True),
        "kernel.1": (narrow + wide + 4, False),
        "turned": (wide + turned, True),
    }


def test_on_gpu_slices_are_moved_and_exchanges_are_not_counted():
    """A fusion that transposes and computes does not merely rewrite an array."""
    x, row = 4 * 8 * 4, 8 * 4
    items = traffic.on_gpu(GPU)
    assert {item["name"]: (item["bytes"], item["rewrites"]) for item in items} == {
        "kernel": (2 * x + 2, False),
        "turned": (2 * x, True),
        "turned.1": (2 * x, False),
        "cut": (2 * row, False),
        "copied": (2 * row, True),
    }
    assert [item["operation"] for item in items if item["operation"]] == ["jit(f)/transpose"]
