"""The best use of a budget of FLOPs under a law, and what one architecture's budget is worth to another."""

import dataclasses
import math
import sys

import numpy as np

from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws.parametric import Law

LEAST_GAMMA = 0.1  # below this, the optimal size is unbounded
_FARTHEST = 600.0  # limit of log N: beyond it (e.g. for noisy resampled runs) N and its powers are not representable


@dataclasses.dataclass(frozen=True)
class Cost:
    """Training FLOPs as kappa N^gamma D. The rule of thumb has kappa = 6 and gamma = 1; as counted, gamma is smaller where
    attention or the logits weigh more in small models, and kappa compensates."""

    kappa: float = 6.0
    gamma: float = 1.0

    @classmethod
    def of(cls, parameters, flops_per_token) -> "Cost":
        """The least-squares fit of log FLOPs per token over log N; for runs of a single size, gamma is 1."""
        x, y = np.log(np.asarray(parameters, np.float64)), np.log(np.asarray(flops_per_token, np.float64))
        spread = x - x.mean()
        gamma = 1.0 if np.abs(spread).max() < 0.01 else float(spread @ (y - y.mean()) / (spread @ spread))
        return cls(float(np.exp(y.mean() - gamma * x.mean())), gamma)

    def check_grows(self) -> None:
        """Raises ``UserError`` if more parameters cost next to nothing, such as experts that a token does not use: then no
        size is the best for a budget."""
        if self.gamma < LEAST_GAMMA:
            raise UserError(
                f"FLOPs per token grow as N^{self.gamma:.3g}, so no size is the best for a budget; give runs of one "
                "sparsity (experts per expert that a token is routed to) an architecture label of their own"
            )

    def per_token(self, parameters: float) -> float:
        """Training FLOPs per token."""
        return self.kappa * parameters**self.gamma


@dataclasses.dataclass(frozen=True)
class Optimum:
    """N, D and the loss, in nats per token, for the best use of a budget."""

    parameters: float
    tokens: float
    loss: float


def compute_optimal(law: Law, flops: float, cost: Cost = Cost()) -> Optimum:
    """N and D of the lowest loss with kappa N^gamma D = ``flops``.

    For kappa = 6 and gamma = 1 this is equation 4 of Hoffmann et al. 2022 (arXiv:2203.15556). In general, D follows from N,
    and the derivative of A N^-alpha + B (kappa N^gamma / C)^beta vanishes at
    N^(alpha + gamma beta) = alpha A / (gamma beta B) (C / kappa)^beta.
    """
    weight = cost.gamma * law.beta
    log_n = math.log(law.alpha * law.A / (weight * law.B)) + law.beta * math.log(flops / cost.kappa)
    parameters = math.exp(max(-_FARTHEST, min(_FARTHEST, log_n / (law.alpha + weight))))
    tokens = flops / cost.per_token(parameters)
    return Optimum(parameters, tokens, float(law.loss(parameters, tokens)))


def exponents(law: Law, cost: Cost = Cost()) -> tuple[float, float]:
    """(a, b) of the optimum: N grows as C^a, D as C^b."""
    total = law.alpha + cost.gamma * law.beta
    return law.beta / total, law.alpha / total


def flops_for_loss(law: Law, loss: float, cost: Cost = Cost()) -> float:
    """FLOPs at which the optimum reaches this loss; infinite at or below E, and beyond what a float holds.

    Along the optimum both terms fall as C^-p, p = alpha beta / (alpha + gamma beta), so L(C) = E + (L(1) - E) C^-p.
    """
    if loss <= law.E:
        return math.inf
    power = law.beta * exponents(law, cost)[1]
    reducible = compute_optimal(dataclasses.replace(law, E=0.0), 1.0, cost).loss
    log_flops = math.log(reducible / (loss - law.E)) / power
    return math.exp(log_flops) if log_flops < math.log(sys.float_info.max) else math.inf


def compute_multiplier(law: Law, cost: Cost, baseline: Law, baseline_cost: Cost, flops: float) -> float:
    """How many times ``flops`` the baseline needs for the loss that ``law`` has at ``flops``. Above 1, ``law`` is
    better."""
    return flops_for_loss(baseline, compute_optimal(law, flops, cost).loss, baseline_cost) / flops
