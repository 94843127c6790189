import ml_dtypes
import numpy as np
import pytest

from tests.ptx import arithmetic

F = np.float32


def pair(low, high):
    return int(np.array([low, high], ml_dtypes.bfloat16).view(np.uint32)[0])


@pytest.mark.parametrize(
    "opcode, operands, expected",
    [
        ("shl.b32", (3, 31), 1 << 31),
        ("shl.b32", (3, 32), 0),
        ("shr.u32", (1 << 31, 40), 0),
        ("shr.s32", (-8, 1), -4),
        ("shr.s32", (-8, 40), -1),
        ("bfe.u32", (0b110100, 2, 3), 0b101),
        ("bfe.s32", (0b110100, 2, 3), -3),
        ("mul.wide.s32", (-3, 1 << 30), -3 << 30),
        ("mul.hi.u32", (1 << 31, 6), 3),
        ("mad.lo.s32", (1 << 31, 2, 5), 5),
        ("div.s32", (-7, 2), -3),
        ("rem.s32", (-7, 2), -1),
        ("rem.u32", (7, 4), 3),
        ("mul.f32", (F(3), F(0.5)), F(1.5)),
        ("cvt.rna.tf32.f32", (F(1 + 2**-11),), 0x3F802000),
        ("cvt.rna.tf32.f32", (np.uint32(0xFFFFFFFF).view(F),), 0x7FFFE000),
        ("prmt.b32", (0x33221100, 0x77665544, 0x7610), 0x77661100),
        ("prmt.b32", (0x00008000, 0, 0x0009), 0x000000FF),  # the sign of a byte
        ("cvt.rn.bf16x2.f32", (F(1.0), F(2.0)), pair(2.0, 1.0)),
        ("cvt.sat.f32.f32", (F(np.nan),), F(0)),
        ("cvt.rzi.s32.f32", (F(-1.7),), -1),
        ("mul.rn.bf16x2", (pair(3.0, -2.0), pair(0.5, 4.0)), pair(1.5, -8.0)),
        ("fma.rm.f32", (F(1), F(2**-30), F(-1)), F(-1)),
        ("fma.rm.f32", (F(-1), F(2**-30), F(1)), np.nextafter(F(1), F(0))),
        ("fma.rn.f32", (F(-1), F(2**-30), F(1)), F(1)),
        ("setp.ltu.f32", (F(np.nan), F(1)), True),
        ("setp.lt.f32", (F(np.nan), F(1)), False),
        ("setp.ne.f32", (F(np.nan), F(1)), False),
        ("setp.lt.and.s32", (-1, 0, False), False),
        ("setp.lt.or.u32", (1, 0, True), True),
        ("max.f32", (F(np.nan), F(1)), F(1)),
        ("setp.ne.bf16", (ml_dtypes.bfloat16(np.nan), ml_dtypes.bfloat16(1)), False),
        ("ex2.approx.ftz.f32", (F(-127),), F(0)),
        ("ex2.approx.f32", (F(-127),), F(2**-127)),
        ("rsqrt.approx.f32", (F(16),), F(0.25)),
        ("selp.f32", (F(1), F(2), False), F(2)),
    ],
)
def test_instructions(opcode, operands, expected):
    def given(i, kind):
        x = np.asarray(operands[i])
        return (x.astype(np.int64) if x.dtype.kind in "iu" else x).astype(arithmetic.TYPES[kind])

    found = np.atleast_1d(arithmetic.apply(opcode, given))[0]
    assert np.array_equal(found, np.asarray(expected).astype(found.dtype))


@pytest.mark.parametrize(
    "opcode", ["max.NaN.f32", "add.rn.ftz.f32", "fma.rn.f64", "cvt.rz.bf16.f32", "prmt.b32.f4e", "vote.b32"]
)
def test_what_is_not_known_is_refused(opcode):
    with pytest.raises(NotImplementedError, match=opcode):
        arithmetic.apply(opcode, None)
