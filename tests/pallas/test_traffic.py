"""What ``benchmarks/layers.py`` counts of a compiled program, for programs written out here."""

import importlib.util
import math
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

TWICE = """HloModule m

%double (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %s = f32[8,128]{1,0:T(8,128)} add(%p, %p), metadata={op_name="one"}
}

%double.1 (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %s.1 = f32[8,128]{1,0:T(8,128)} add(%q, %q), metadata={op_name="other"}
}

%square (r: f32[8,128]) -> f32[8,128] {
  %r = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %s.2 = f32[8,128]{1,0:T(8,128)} multiply(%r, %r)
}

%update (a: f32[8,128], b: f32[1,128], i: s32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[1,128]{1,0:T(1,128)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%a, %b, %i, %i)
}

ENTRY %main (x: f32[8,128], row: f32[1,128], at: s32[]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %row = f32[1,128]{1,0:T(1,128)} parameter(1)
  %at = s32[] parameter(2)
  %f = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%double, metadata={op_name="one"}
  %f.1 = f32[8,128]{1,0:T(8,128)} fusion(%f), kind=kLoop, calls=%double.1, metadata={op_name="other"}
  %g = f32[8,128]{1,0:T(8,128)} fusion(%f.1), kind=kLoop, calls=%square
  %kernel.3 = f32[8,128]{1,0:T(8,128)} custom-call(%g, %g), custom_call_target="tpu"
  %kernel.4 = f32[8,128]{1,0:T(8,128)} custom-call(%kernel.3, %g), custom_call_target="tpu"
  ROOT %h = f32[8,128]{1,0:T(8,128)} fusion(%kernel.4, %row, %at), kind=kLoop, calls=%update
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


def test_equal_programs_have_the_cycles_of_one_and_what_is_read_twice_counts_once():
    """libtpu compiles equal programs once, and writes one schedule."""
    found, whole, row = traffic.on_tpu(TWICE), 8 * 128 * 4, 128 * 4
    assert {item["name"]: item["bytes"] for item in found} == {
        **{"f": 2 * whole, "f.1": 2 * whole, "g": 2 * whole, "kernel.3": 2 * whole, "kernel.4": 3 * whole},
        "h": 2 * row,
    }
    traffic.add_cycles(found, {"f.1": 7.0, "g": math.nan, "kernel.3": 5.0, "h": 2.0})
    assert [item["cycles"] for item in found] == [7.0, 7.0, 0.0, 5.0, 5.0, 2.0]


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
