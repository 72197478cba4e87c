"""Spend compute by a law: the best size and length, compute saved, data transferred.

Training costs C = 6 N D floating-point operations. For L = E + A/N^alpha + B/(D^beta N^gamma) the
best split is N = G (C/6)^a, D = (C/6)^b / G with

    a = beta / (alpha + beta - gamma)     b = (alpha - gamma) / (alpha + beta - gamma)
    G = (alpha A / ((beta - gamma) B))^(1 / (alpha + beta - gamma))

(arXiv 2407.02118; with gamma = 0 arXiv 2203.15556). It exists where alpha > gamma and beta > gamma.
All fields may be arrays, one entry per draw of a bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOPS_PER_TOKEN_AND_PARAMETER = 6


@dataclass(frozen=True)
class PowerLaw:
    """L = E + A/N^alpha + B/(D^beta N^gamma); the fields are floats or arrays of one shape."""

    E: Any
    A: Any
    alpha: Any
    B: Any
    beta: Any
    gamma: Any = 0.0

    def loss(self, params: Any, tokens: Any) -> Any:
        """Return the loss of a model of `params` after `tokens`."""
        log_n, log_d = np.log(params), np.log(tokens)
        size = self.A * np.exp(-self.alpha * log_n)
        return self.E + size + self.B * np.exp(-self.beta * log_d - self.gamma * log_n)

    @property
    def exponents(self) -> tuple[Any, Any]:
        """(a, b): the best size grows as C^a and the best length as C^b; nan without an optimum."""
        total = self.alpha + self.beta - self.gamma
        exists = (self.alpha > self.gamma) & (self.beta > self.gamma) & (self.alpha > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = self.beta / total, (self.alpha - self.gamma) / total
        return _where(exists, a), _where(exists, b)

    def best(self, flops: Any) -> tuple[Any, Any]:
        """Return the parameters and tokens of the lowest loss for a budget; nan without one."""
        a, b = self.exponents
        total = self.alpha + self.beta - self.gamma
        with np.errstate(divide="ignore", invalid="ignore"):
            log_g = np.log(self.alpha * self.A / ((self.beta - self.gamma) * self.B)) / total
        log_c = np.log(np.asarray(flops) / FLOPS_PER_TOKEN_AND_PARAMETER)
        return _plain(np.exp(log_g + a * log_c)), _plain(np.exp(b * log_c - log_g))

    def best_loss(self, flops: Any) -> Any:
        """Return the lowest loss for a budget."""
        return self.loss(*self.best(flops))

    def given_away(self, params: Any, flops: Any) -> Any:
        """Return how much higher the loss is than the best for the budget, as a part of the best.

        Args:
            params: the size that is trained, with the tokens that the budget allows.
            flops: the budget.
        """
        tokens = np.asarray(flops) / (FLOPS_PER_TOKEN_AND_PARAMETER * np.asarray(params))
        return self.loss(params, tokens) / self.best_loss(flops) - 1

    def flops_for(self, loss: Any) -> Any:
        """Return the smallest budget that reaches a loss; inf at E and below, nan without one.

        At the best split loss - E = k C^-s with s = alpha beta / (alpha + beta - gamma)
        (both terms fall as C^-s).
        """
        speed = self.alpha * self.exponents[0]
        k = self.best_loss(FLOPS_PER_TOKEN_AND_PARAMETER) - self.E
        over = np.maximum(np.asarray(loss) - self.E, 0.0)
        with np.errstate(divide="ignore"):
            return _plain(FLOPS_PER_TOKEN_AND_PARAMETER * np.exp(np.log(k / over) / speed))


def law_of(constants: Mapping[str, Any], kind: str = "scratch") -> PowerLaw | None:
    """Return the law of one kind of runs from a form's constants; None for forms of other kinds.

    Args:
        constants: {name: value or array}.
        kind: ``scratch`` or ``continued``; a form without kinds has one law for both.
    """
    if not {"E", "A", "alpha", "B", "beta"} <= set(constants):
        return None
    c = constants
    if "B'" not in c:
        return PowerLaw(c["E"], c["A"], c["alpha"], c["B"], c["beta"], c.get("gamma", 0.0))
    if kind == "scratch":
        return PowerLaw(c["E"], c["A"], c["alpha"], c["B"], c["beta"])
    return PowerLaw(c["E"], c["A"], c["alpha"], c["B'"], c["beta'"], c["gamma"])


def compute_saved(scratch: PowerLaw, continued: PowerLaw, flops: Any) -> Any:
    """Return the part of the compute of a run from scratch that continued training saves.

    Args:
        scratch: the law from scratch.
        continued: the law of continued training.
        flops: the budget of continued training, spent at its best split.

    Returns:
        1 - C / C', with C' the budget that reaches the same loss from scratch at its best split;
        negative where continued training is worse.
    """
    return 1 - np.asarray(flops) / scratch.flops_for(continued.best_loss(flops))


def transferred_tokens(scratch: PowerLaw, continued: PowerLaw, params: Any, tokens: Any) -> Any:
    """Return effectively transferred data: the tokens that pre-training is worth.

    Args:
        scratch: the law from scratch.
        continued: the law of continued training, with the same E, A and alpha.
        params: the size.
        tokens: of continued training.

    Returns:
        Tokens from scratch that give the same loss at the same size, less `tokens`.
    """
    log_n, log_d = np.log(params), np.log(tokens)
    term = np.log(continued.B) - continued.beta * log_d - continued.gamma * log_n
    return np.exp((np.log(scratch.B) - term) / scratch.beta) - tokens


def _where(exists: Any, value: Any) -> Any:
    return _plain(np.where(exists, value, np.nan))


def _plain(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else value
