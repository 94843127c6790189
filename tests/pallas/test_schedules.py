"""The reader of libtpu's schedules, from which ``benchmarks/tpu_kernels.py`` counts cycles."""

import importlib.util
import math
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "benchmarks" / "schedules.py"
_SPEC = importlib.util.spec_from_file_location("schedules", _PATH)
schedules = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(schedules)

# Two bundles before the grid's loop, which has 4 + 1 bundles of its own, one of them not marked, and 3 of an inner loop,
# which runs 16 times; one bundle follows.
KERNEL = """
     0   :  { %s0 = inlined_call_operand.hbm [shape: f32[8,128]] }
   0x1   :  { %s1 = smov 0 }
   0x2 LB: > { %s2 = sphi %s1, %s9 }
   0x3   :  { %s3 = sst [smem:[#allocation2]] %s2 }
   0x4   : > { %s4 = sadd.s32 1, %s2 }
   0x5 LB: >> { %s5 = sphi %s1, %s6 }
   0x6   : >> { %p6 = scmp.ge.s32.totalorder %s6, 16 /* loop exit test */ }
   0x7   : >> { %8 = sbr.rel (!%p6) target bundleno = 5 }
   0x8   : > { %p9 = scmp.ge.s32.totalorder %s9, 12 /* loop exit test */ }
   0x9 PF: > { %10 = sbr.rel (!%p9) target bundleno = 2 }
   0xa   :  { %11 = vsyncpa [#allocation3], 1 }
"""


def cycles_of(text, tmp_path):
    (tmp_path / "file").write_text(text)
    return schedules.cycles(*schedules.read(tmp_path / "file"))


def test_cycles_are_bundles_times_trips(tmp_path):
    """A kernel's grid makes two more trips than it has blocks."""
    assert cycles_of(KERNEL, tmp_path) == 3 + 12 * 5 + (12 - 2) * 16 * 3
    assert cycles_of(KERNEL.replace("inlined_call_operand", "parameter"), tmp_path) == 3 + 12 * 5 + 12 * 16 * 3


def test_loops_beside_each_other(tmp_path):
    loop = "\n".join(KERNEL.splitlines()[6:9])
    assert (
        cycles_of(f"\n   0x1   :  {{ a }}\n{loop}\n{loop.replace('16 /*', '3 /*')}\n", tmp_path) == 1 + 3 * 16 + 3 * 3
    )


def test_of_a_loop_whose_test_stands_within_another(tmp_path):
    """Three trips of one bundle and an inner loop, whose first bundle holds the outer loop's exit test."""
    inner, *rest = KERNEL.splitlines()[6:9]
    test = "%p4 = scmp.ge.s32.totalorder (%p3), %s5_s1, 3 /* loop exit test */"
    inner = inner.replace("{", f"{{ {test}  ;; ")
    outer = "   0x4 LB: > { %s4 = sphi %s0, %s5_s1 /* phi copy */ }"
    assert cycles_of("\n".join(["", outer, inner, *rest]), tmp_path) == 3 * (1 + 16 * 3)


def test_trips_that_are_not_constant_are_unknown(tmp_path):
    assert math.isnan(cycles_of(KERNEL.replace("%s6, 16", "%s6, %s7"), tmp_path))


@pytest.mark.parametrize("operation, found", [("copy", [4 * 2**20]), ("add", [])])
def test_relayouts(operation, found):
    line = (
        f"  %{operation}.1 = f32[1024,1024]{{1,0:T(8,128)}} {operation}(%x.1)\n  %copy.2 = f32[8,128]{{1,0}} copy(%x.2)"
    )
    assert schedules.relayouts(f"HloModule m\n\nENTRY %main {{\n{line}\n}}") == found
