"""Instructions of a single thread: from numbers in its registers to a number."""

import re

import ml_dtypes
import numpy as np

TYPES = {
    "pred": np.bool_,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
}
# Only with these modifiers: what is not listed here is refused, not mistaken for something else.
_KNOWN = re.compile(
    "|".join(
        (
            r"(mov|selp|and|or|xor|not|shl|shr|bfe)\.(pred|[fusb]\d+)",
            r"cvta\.to\.global\.u64|prmt\.b32",
            r"setp\.((eq|ne|lt|le|gt|ge)u?|nan|num)(\.(and|or|xor))?\.(bf16|[fusb]\d+)",
            r"(add|sub)(\.rn)?\.(f32|bf16x?2?|[us]\d+)|(min|max)\.(f32|bf16x?2?|[us]\d+)",
            r"mul\.(lo|hi|wide)\.[us]\d+|mul(\.rn)?\.(f32|bf16x?2?)|(div|rem)\.[us]\d+|mad\.(lo|wide)\.[us]\d+",
            r"fma\.r[nm]\.f32|fma\.rn\.bf16x?2?",
            r"(neg|abs)\.(f32|bf16|s\d+)|div\.(full|rn)\.f32|(rcp|sqrt|ex2|lg2)\.(approx|rn)\.f32",
            r"(ex2|rcp)\.approx\.ftz\.f32|rsqrt\.approx\.f32",
            r"cvt\.([usb]\d+\.[usb]\d+|f32\.bf16|rn\.bf16\.f32|rn\.bf16x2\.f32|sat\.f32\.f32|rn\.b?f\d+\.[us]\d+)",
            r"cvt\.r[znmp]i\.([us]\d+|f32)\.f32|cvt\.rna\.tf32\.f32",
        )
    )
)
_FLOATING = ("f16", "f32", "f64", "bf16")
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_EXTREMES = {"max": np.fmax, "min": np.fmin}
_SUMS = {"add": np.add, "sub": np.subtract}
_OF_ONE = {
    "neg": np.negative,
    "abs": np.abs,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "ex2": np.exp2,
    "lg2": np.log2,
}


def apply(opcode: str, given) -> np.ndarray:
    """The value of the first operand. ``given(i, type)`` returns the others, as the named type."""
    name, *parts = opcode.split(".")
    kind = parts[-1]
    if not _KNOWN.fullmatch(opcode):
        raise NotImplementedError(opcode)
    with np.errstate(all="ignore"):
        if name in ("mov", "cvta"):
            return given(0, kind)
        if name == "cvt":
            return _convert(parts, given)
        if name == "setp":
            return _compare(parts, given)
        if name == "selp":
            return np.where(given(2, "pred"), given(0, kind), given(1, kind))
        if name in _LOGIC:
            return _LOGIC[name](given(0, kind), given(1, kind))
        if name == "not":
            return ~given(0, kind)
        if name in ("shl", "shr"):
            return _shift(name, given(0, kind), given(1, "u32"))
        if name == "bfe":
            return _bits(given(0, kind), given(1, "u32"), given(2, "u32"))
        if name == "prmt":
            return _bytes(given(0, "u32"), given(1, "u32"), given(2, "u32"))
        if kind == "bf16x2":
            return _pairs(name, parts, given)
        if name in ("fma", "mad") or (name == "mul" and parts[0] in ("lo", "hi", "wide")):
            return _multiply(name, parts, given)
        if name == "mul":
            return given(0, kind) * given(1, kind)
        if name in _SUMS:
            return _SUMS[name](given(0, kind), given(1, kind))
        if name in _EXTREMES:
            return _EXTREMES[name](given(0, kind), given(1, kind))
        if name == "div" and kind == "f32":
            return given(0, kind) / given(1, kind)
        if name in ("div", "rem"):
            return _divide(name, given(0, kind), given(1, kind))
        if name in _OF_ONE:
            found = _OF_ONE[name](given(0, kind))
            return np.where(abs(found) < np.float32(2**-126), np.float32(0), found) if "ftz" in parts else found
    raise NotImplementedError(opcode)


def _compare(parts: list[str], given) -> np.ndarray:
    comparison, *logic, kind = parts
    if logic:  # with a third operand
        return _LOGIC[logic[0]](_compare([comparison, kind], given), given(2, "pred"))
    if comparison in _COMPARE:
        a, b = given(0, kind), given(1, kind)
        found = _COMPARE[comparison](a, b)
        return found & (a == a) & (b == b) if kind in _FLOATING else found
    if comparison.endswith("u") and kind in _FLOATING:
        a, b = given(0, kind), given(1, kind)
        return _COMPARE[comparison[:-1]](a, b) | (a != a) | (b != b)
    if comparison in ("nan", "num"):
        unordered = (given(0, kind) != given(0, kind)) | (given(1, kind) != given(1, kind))
        return unordered if comparison == "nan" else ~unordered
    raise NotImplementedError(f"setp.{comparison}")


def _convert(parts: list[str], given) -> np.ndarray:
    to, kind = parts[-2:]
    if to == "tf32":  # 13 bits fewer, ties away from zero
        x = np.asarray(given(0, kind))
        return np.where(x != x, np.uint32(0x7FFFE000), x.view(np.uint32) + np.uint32(1 << 12) & np.uint32(0xFFFFE000))
    if to == "bf16x2":  # the first operand is the upper half
        high, low = (given(i, kind).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for i in (0, 1))
        return high << np.uint32(16) | low
    x = given(0, kind)
    if "sat" in parts:
        x = np.clip(np.where(x != x, np.float32(0), x), 0, 1)
    if kind[0] in "fb" and to[0] in "us":
        bounds = np.iinfo(TYPES[to])
        x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[parts[0]](x.astype(np.float64))
        return np.clip(np.where(x != x, 0, x), bounds.min, bounds.max).astype(TYPES[to])
    if parts[0] in ("rzi", "rni", "rmi", "rpi"):
        return {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[parts[0]](x)
    return x.astype(TYPES[to])


def _divide(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Quotient or remainder, rounding towards zero."""
    quotient = x // y
    if x.dtype.kind == "i":
        quotient = quotient + ((x % y != 0) & ((x < 0) != (y < 0)))
    return quotient if name == "div" else x - quotient * y


def _shift(name: str, x: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = x.dtype.itemsize * 8
    moved = (np.left_shift if name == "shl" else np.right_shift)(x, np.minimum(count, bits - 1).astype(x.dtype))
    if name == "shr" and x.dtype.kind == "i":
        return moved  # large shifts leave only the sign
    return np.where(count >= bits, x.dtype.type(0), moved)


def _bits(x: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = x.dtype.itemsize * 8
    assert np.all(first + count <= bits)
    up = (bits - first - count).astype(x.dtype)
    down = (bits - count).astype(x.dtype)
    return np.where(count == 0, x.dtype.type(0), np.right_shift(np.left_shift(x, up), down))


def _bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for i in range(4):
        chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        found = found | np.where(chosen & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return found


def _pairs(name: str, parts: list[str], given) -> np.ndarray:
    count = 3 if name == "fma" else 2
    x = [np.ascontiguousarray(np.atleast_1d(given(i, "b32"))).view(ml_dtypes.bfloat16) for i in range(count)]
    length = max(len(y) for y in x)
    x = [np.resize(y, length) for y in x]
    if name == "fma":
        wide = [y.astype(np.float32) for y in x]
        found = (wide[0] * wide[1] + wide[2]).astype(ml_dtypes.bfloat16)
    else:
        found = {"mul": np.multiply, "max": np.fmax, "min": np.fmin, **_SUMS}[name](*x)
    return found.view(np.uint32)


def _multiply(name: str, parts: list[str], given) -> np.ndarray:
    kind = parts[-1]
    if name == "fma" and kind in ("f32", "bf16"):
        exact = given(0, kind).astype(np.float64) * given(1, kind).astype(np.float64) + given(2, kind).astype(
            np.float64
        )
        found = exact.astype(TYPES[kind])
        if "rm" in parts:
            found = np.where(found > exact, np.nextafter(found, np.float32(-np.inf)), found)
        return found
    a, b, bits = given(0, kind), given(1, kind), TYPES[kind].itemsize * 8
    wide = {16: {"u": np.uint32, "s": np.int32}, 32: {"u": np.uint64, "s": np.int64}}
    if "wide" in parts:
        to = wide[bits][kind[0]]
        found = a.astype(to) * b.astype(to)
        return found + given(2, f"{kind[0]}{2 * bits}") if name == "mad" else found
    if "hi" in parts:
        to = wide[bits][kind[0]]
        return (a.astype(to) * b.astype(to) >> to(bits)).astype(a.dtype)
    return a * b + given(2, kind) if name == "mad" else a * b
