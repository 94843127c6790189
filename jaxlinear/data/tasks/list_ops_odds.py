"""How often an expression of ListOps has which number of tokens and which value.

An argument is a digit or, with probability ``nested``, an operation, and arguments do not depend on each other. Let a_v(z)
be the sum, over the arguments of value v, of probability times z to the number of tokens, and s_v = a_0 + ... + a_v. Then c
arguments have

    a largest value of at most v           s_v^c
    a smallest value above v               (s_9 - s_v)^c
    k values of at most v                  binomial(c, k) s_v^k (s_9 - s_v)^(c - k)
    a sum of v modulo 10                   1/10 sum_w e^(-2 pi i w v / 10) (sum_u e^(2 pi i w u / 10) a_u)^c

These functions are known at points of a circle around 0; a Fourier transform gives their coefficients.
"""

import functools
import math

import numpy as np

_VALUES = 10
_LOST = 1e-10


@functools.lru_cache(maxsize=32)
def odds(depth: int, arguments: int, nested: float, most: int) -> np.ndarray:
    """Probabilities ``[most + 1, 10]`` of the expressions with up to ``most`` tokens, by tokens and value.

    Args:
      depth: how deep operations are nested at most.
      arguments: of an operation, from 2 to so many, each number as often as the others.
      nested: the probability that an argument is an operation, where these may be nested further.
      most: the largest number of tokens.
    """
    z = _circle(most)
    digits = np.broadcast_to(z / _VALUES, (_VALUES, len(z)))
    operation = _operation(digits, arguments) * z**2
    for _ in range(depth - 1):
        operation = _operation((1 - nested) * digits + nested * operation, arguments) * z**2
    return _coefficients(operation, most).T


def lengths(depth: int, arguments: int, nested: float, most: int) -> np.ndarray:
    """``odds`` of all values together, in a fraction of the time."""
    z = _circle(most)
    operation = np.zeros_like(z)
    for level in range(depth):
        argument = z if level == 0 else (1 - nested) * z + nested * operation
        power, total = argument, np.zeros_like(z)
        for _ in range(2, arguments + 1):
            power = power * argument
            total += power
        operation = z**2 * total / (arguments - 1)
    return _coefficients(operation, most)


def _circle(most: int) -> np.ndarray:
    """Half of the points, since the coefficients are real. Those of lengths over ``most`` add ``_LOST`` of themselves."""
    points = 2 * (most + 1)
    return _LOST ** (1 / points) * np.exp(-2j * np.pi * np.arange(points // 2 + 1) / points)


def _coefficients(at_points: np.ndarray, most: int) -> np.ndarray:
    points = 2 * (most + 1)
    found = np.fft.irfft(at_points, points)[..., : most + 1] * _LOST ** (-np.arange(most + 1) / points)
    return np.maximum(found, 0)


def _operation(a: np.ndarray, arguments: int) -> np.ndarray:
    """By value, the function of an operation without its two brackets, from ``a`` ``[10, points]``."""
    waves = np.exp(2j * np.pi * np.outer(np.arange(_VALUES), np.arange(_VALUES)) / _VALUES)
    low = np.cumsum(a, axis=0)
    lows, highs, waved = (_powers(x, arguments) for x in (low, low[-1] - low, waves @ a))
    at_most, above = (np.sum(x[2:], axis=0) for x in (lows, highs))
    largest, smallest = _values(at_most), _values(-above, -at_most[-1])
    sums = waves.conj() @ np.sum(waved[2:], axis=0) / _VALUES
    medians = sum(_median(lows, highs, count) for count in range(2, arguments + 1))
    return (largest + smallest + sums + medians) / (4 * (arguments - 1))


def _median(lows: list[np.ndarray], highs: list[np.ndarray], count: int) -> np.ndarray:
    """Of so many arguments, rounded down. Of an even number it is between the two in the middle."""
    half = count // 2
    least = half + count % 2  # so many are at most v if the one in the middle, or the lower of the two, is
    found = _values(sum(math.comb(count, k) * lows[k] * highs[count - k] for k in range(least, count + 1)))
    if count % 2 == 0:
        below, above = _values(lows[half]), _values(-highs[half], -lows[half][-1])
        for lower in range(_VALUES):
            for upper in range(lower + 1, _VALUES):
                both = math.comb(count, half) * below[lower] * above[upper]
                found[lower] -= both
                found[(lower + upper) // 2] += both
    return found


def _values(at_most: np.ndarray, before: np.ndarray | int = 0) -> np.ndarray:
    """Of each value, from those of at most each."""
    return np.diff(at_most, axis=0, prepend=np.broadcast_to(before, at_most[:1].shape))


def _powers(x: np.ndarray, most: int) -> list[np.ndarray]:
    """Up to ``most``, as products: complex powers take NumPy many times as long."""
    found = [np.ones_like(x)]
    for _ in range(most):
        found.append(found[-1] * x)
    return found
