"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta, fitted to losses (Hoffmann et al. 2022, approach 3)."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from scipy import optimize
from threadpoolctl import threadpool_limits

from jaxlinear.errors import UserError

DELTA = 1e-3  # of the Huber loss, as in Hoffmann et al. 2022 (arXiv:2203.15556), section 3.3
EXPONENTS = (0.02, 2.5)  # search range of alpha and beta
_GRID = np.linspace(0.05, 1.5, 12)  # of alpha and of beta, for the starting points
_STARTS = 20
_STRAIGHT = 0.1  # least RMS deviation of log D from a linear function of log N; below it N and D cannot be told apart
_TERMS = (-15.0, 5.0)  # range of the logarithm of each term of the loss, in nats, at the mean log N and log D


@dataclasses.dataclass(frozen=True)
class Law:
    """Loss in nats per token for N parameters after D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters, tokens) -> np.ndarray:
        """Loss in nats per token; arrays of N and D are taken elementwise."""
        return self.E + self.A * np.power(parameters, -self.alpha) + self.B * np.power(tokens, -self.beta)


# The optimiser solves systems of about ten unknowns, which BLAS would spread over threads: ten times slower, and worse on a
# busy machine.
one_thread = functools.partial(threadpool_limits, 1, "blas")


def fit(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], *, delta: float = DELTA) -> Law:
    """The law with the least sum of Huber losses of log L, by L-BFGS from many starts.

    Args:
      parameters, tokens, losses: N, D and L of each run.
      delta: the difference of logarithms at which the Huber loss changes from quadratic to linear.

    Raises:
      UserError: the runs are too few or too alike for five constants, or their tokens are a function of their sizes.
    """
    x, y, z = log_points(parameters, tokens, losses)
    _check(x, y)
    centre = np.array([x.mean(), y.mean()])
    x, y = x - centre[0], y - centre[1]
    with one_thread():
        ends = [_minimise(start, x, y, z, delta) for start in _starts(x, y, z, delta)]
    return _law(min(ends, key=lambda end: end[0])[1], centre)


def refit(law: Law, x: np.ndarray, y: np.ndarray, z: np.ndarray, *, delta: float = DELTA) -> Law:
    """As ``fit``, from log N, log D and log L and only one start, ``law``, which should be near."""
    centre = np.array([x.mean(), y.mean()])
    start = np.log(np.maximum([law.A, law.B, law.E], np.exp(_TERMS[0])))
    start[:2] -= np.array([law.alpha, law.beta]) * centre
    start = np.clip(start, *_TERMS)
    end = _minimise(np.array([*start, law.alpha, law.beta]), x - centre[0], y - centre[1], z, delta)
    return _law(end[1], centre)


def log_points(parameters, tokens, losses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Natural logarithms of N, D and L. ``UserError`` for lists of different lengths, or numbers without a logarithm."""
    arrays = [np.asarray(values, np.float64) for values in (parameters, tokens, losses)]
    if not all(array.shape == arrays[0].shape and array.ndim == 1 for array in arrays):
        raise UserError("parameters, tokens and losses must be lists of the same length")
    if not all(np.isfinite(array).all() and (array > 0).all() for array in arrays):
        raise UserError("parameters, tokens and losses must be finite and above 0")
    x, y, z = map(np.log, arrays)
    return x, y, z


def distinct(logs: np.ndarray) -> int:
    """The number of distinct values, up to a hundredth."""
    return 1 + int((np.diff(np.sort(logs)) > 0.01).sum())


def _check(x: np.ndarray, y: np.ndarray) -> None:
    counts = {"runs": len(x), "sizes": distinct(x), "numbers of tokens": distinct(y)}
    for (what, count), least in zip(counts.items(), (6, 3, 3), strict=True):
        if count < least:
            raise UserError(f"the parametric law needs at least {least} {what}, not {count}")
    spread = np.std(y)
    if spread < _STRAIGHT:
        raise UserError(
            "the parametric law needs runs that differ more in tokens: the standard deviation of the logarithms is "
            f"only {spread:.2g}"
        )
    slope, constant = np.polyfit(x, y, 1)
    # With D as N^slope the law is A N^-alpha + B' N^-(slope beta), the same with its terms exchanged, and resampled runs
    # agree with whichever the fit found. Where D falls as N grows, as along one budget, their signs tell them apart.
    if slope > -0.1 and np.sqrt(np.mean((y - slope * x - constant) ** 2)) < _STRAIGHT:
        raise UserError(
            f"tokens follow from the size (as N^{slope:.2f}), so the effects of N and D on the loss cannot be "
            "separated; the parametric law needs two or more numbers of tokens per size, and three in all"
        )


def objective(theta: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    """The sum over runs of Huber(log L_fit - log L) / delta^2, and its gradient.

    ``theta`` is (log A, log B, log E, alpha, beta), so that log L_fit = logsumexp(log A - alpha x, log B - beta y, log E).
    It is a sum rather than a mean, scaled so that the optimiser's tolerances are meaningful: with a mean of so small a loss
    it stops early (Besiroglu et al. 2024, arXiv:2404.10102, section 3).
    """
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)])
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    difference = (top + np.log(total) - z) / delta
    slope = np.clip(difference, -1, 1)
    shares *= slope / (total * delta)
    of_terms = shares.sum(1)
    return float((slope * (difference - slope / 2)).sum()), np.array([*of_terms, -shares[0] @ x, -shares[1] @ y])


def _starts(x: np.ndarray, y: np.ndarray, z: np.ndarray, delta: float) -> list[np.ndarray]:
    """The best of a grid of exponents; for each, A, B and E are the least squares of L_fit / L - 1, which is linear."""
    weights = np.exp(-z)
    starts = []
    for alpha in _GRID:
        for beta in _GRID:
            columns = np.stack([np.exp(-alpha * x), np.exp(-beta * y), np.ones_like(x)], 1)
            terms, _ = optimize.nnls(columns * weights[:, None], np.ones_like(x))
            theta = np.array([*np.log(np.maximum(terms, 1e-2 / weights.max())), alpha, beta])
            starts.append((objective(theta, x, y, z, delta)[0], theta))
    return [theta for _, theta in sorted(starts, key=lambda start: start[0])[:_STARTS]]


def _minimise(start: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    result = optimize.minimize(
        objective,
        start,
        args=(x, y, z, delta),
        jac=True,
        method="L-BFGS-B",
        bounds=[_TERMS] * 3 + [EXPONENTS] * 2,
        options={"maxiter": 1000, "ftol": 1e-11, "gtol": 1e-6},
    )
    return result.fun, result.x


def _law(theta: np.ndarray, centre: np.ndarray) -> Law:
    a, b, e, alpha, beta = map(float, theta)
    a, b = a + alpha * centre[0], b + beta * centre[1]
    return Law(E=float(np.exp(e)), A=float(np.exp(a)), B=float(np.exp(b)), alpha=alpha, beta=beta)
