"""Inputs of an operation for ``launch/check.py``: with the shapes of a call, and as hard as training may make them."""

from typing import Any

import ml_dtypes
import numpy as np

from jaxlinear.ops.calls import Call

# How much a state forgets: little; nearly everything at each token; or anything in between, by channel and by token, where
# keys of the delta rule are also alike. Operations that forget nothing have only the first and the last kind.
MIXED = "mixed"
KINDS = ("weak", "strong", MIXED)
_FORGETS = {"log_decay", "a", "dt", "rate"}
_PARAMETERS = (
    "A",
    "kernel",
    "bias",
    "recurrence_kernel",
    "input_kernel",
    "recurrence_bias",
    "input_bias",
    "scale",
    "skip",
)
_ALIKE = 0.1  # how far keys are from the key that they resemble
_DOCUMENT = 40  # mean number of tokens per document


def kinds_of(call: Call) -> tuple[str, ...]:
    """The ``KINDS`` that make a difference for this call."""
    return KINDS if _FORGETS & set(call.arrays) else ("weak", MIXED)


def constants(call: Call) -> set[str]:
    """The decays, rates and other parameters, which are the same for all tokens."""
    arrays = call.arrays
    tokens = arrays["x" if "x" in arrays else "v"].shape[:2]
    return {name for name in (*_FORGETS, *_PARAMETERS) if name in arrays and arrays[name].shape[:2] != tokens}


def draw(call: Call, kind: str, random: np.random.Generator) -> dict[str, np.ndarray]:
    """The arrays of the call by name, each in its dtype."""
    draws = _Draws(kind, random, bool(call.options.get("negative_eigenvalues")))
    drawn = {name: draws.of(call.operation, name, shape) for name, shape in call.arrays.items()}
    if call.operation == "selective_scan" and "A" not in drawn:  # dt B^2 must be at most 1
        drawn["dt"] = drawn["dt"] / np.maximum(1, np.max(drawn["B"] ** 2, axis=-1, keepdims=True))
    return {name: _rounded(x, call.arrays[name].dtype) for name, x in drawn.items()}


def normal(shape: Any, random: np.random.Generator) -> np.ndarray:
    """Standard normal numbers, with the given shape and its dtype."""
    return _rounded(_normal(shape, random), shape.dtype)


def _normal(shape: Any, random: np.random.Generator) -> np.ndarray:
    x = random.standard_normal(shape.shape)
    return x + 1j * random.standard_normal(shape.shape) if _is_complex(shape) else x


def _is_complex(shape: Any) -> bool:
    return np.issubdtype(shape.dtype, np.complexfloating)


def _rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(np.float32).astype(dtype) if dtype == ml_dtypes.bfloat16 else x.astype(dtype)


class _Draws:
    """Draws arguments by their meaning, in float64."""

    def __init__(self, kind: str, random: np.random.Generator, negative_eigenvalues: bool):
        self.kind, self.random, self.most_replaced = kind, random, 1.9 if negative_eigenvalues else 1.0

    def of(self, operation: str, name: str, shape: Any) -> np.ndarray:
        size = shape.shape
        if name == "segment_ids":
            return np.cumsum(self.random.uniform(size=size) < 1 / _DOCUMENT, axis=1)
        if name == "first":
            return np.diff(self.of(operation, "segment_ids", shape), axis=1, prepend=-1) != 0
        if name in ("log_decay", "rate"):
            return -self._rates(size)
        if name.endswith("kernel"):
            return _normal(shape, self.random) * size[-2] ** -0.5
        if name == "a":
            turned = np.exp(1j * self.random.uniform(-np.pi, np.pi, size)) if _is_complex(shape) else 1
            return turned * np.exp(-self._rates(size))
        if name == "dt":  # of a selective scan, whose rates are about 1 to N
            return np.minimum(1, 0.2 * self._rates(size))
        if name == "A":
            return -np.arange(1, size[1] + 1) * self.random.uniform(0.5, 1.5, size)
        if name == "beta":
            return self.random.uniform(0, self.most_replaced, size)
        if (operation, name) == ("delta_rule", "k"):
            return self._unit_keys(size)
        return _normal(shape, self.random)

    def _rates(self, size: tuple[int, ...]) -> np.ndarray:
        """Minus log decays."""
        if self.kind == "weak":
            return self.random.exponential(0.02, size)
        if self.kind == "strong":
            return 1 + self.random.exponential(2.0, size)
        return 10 ** self.random.uniform(-4, 1, size)

    def _unit_keys(self, size: tuple[int, ...]) -> np.ndarray:
        k = self.random.standard_normal(size)
        if self.kind == MIXED:
            k = self.random.standard_normal((size[0], 1, *size[2:])) + _ALIKE * k
        return k / np.linalg.norm(k, axis=-1, keepdims=True)
