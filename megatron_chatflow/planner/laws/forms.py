"""Forms of laws: the loss as a sum of terms, each a coefficient times powers of the run's numbers.

    plain      L = E + A/N^alpha + B/D^beta
    extended   L = E + A/N^alpha + B/(D^beta N^gamma)
    joint      scratch:   E + A/N^alpha + B/D^beta
               continued: E + A/N^alpha + B'/(D^beta' N^gamma)

N is the number of parameters (non-embedding and output layer), D of training tokens
(arXiv 2203.15556; the joint form arXiv 2407.02118).

The logarithm of every term is linear in the logarithm of its coefficient and in its exponents. All
that a fit needs follows from that: the Jacobian, the starts, the constants that runs determine. The
logarithms of N and D are centered, so that coefficients and exponents are nearly uncorrelated.
Another law of this kind is one more `Form`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.run_table import RunRecord

Array = np.ndarray


@dataclass(frozen=True)
class Variable:
    """A number of a run of which a law has a power."""

    name: str
    """As formulas have it, e.g. ``N``."""
    what: str
    """As messages have it, e.g. ``size``."""
    log: Callable[[RunRecord], float]
    """Its natural logarithm."""


SIZE = Variable("N", "size", lambda run: float(np.log(run.params)))
LENGTH = Variable("D", "length", lambda run: float(np.log(run.tokens)))


@dataclass(frozen=True)
class Power:
    """A factor ``variable ^ (sign * exponent)`` of a term."""

    exponent: str
    variable: Variable
    sign: int = -1
    grid: tuple[float, ...] = (0.08, 0.13, 0.2, 0.3, 0.45, 0.7, 1.1)
    """Values from which fits start."""

    @property
    def positive(self) -> bool:
        """Whether the exponent must be positive: the loss falls with the variable."""
        return min(self.grid) > 0


GAMMA_GRID = (-0.4, -0.15, 0.0, 0.15, 0.4)


@dataclass(frozen=True)
class Term:
    """A coefficient times powers, in runs of one kind or of all."""

    coefficient: str
    powers: tuple[Power, ...] = ()
    kind: str | None = None

    def active(self, run: RunRecord) -> bool:
        """Return whether the loss of a run has this term."""
        return self.kind is None or self.kind == run.kind


@dataclass(frozen=True)
class Form:
    """A law without its constants."""

    name: str
    formula: str
    terms: tuple[Term, ...]
    fixed: Mapping[str, float] = field(default_factory=dict)
    """{constant: value} of constants that are not fitted."""

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The coefficients of the terms that are fitted, in order."""
        return tuple(t.coefficient for t in self.terms if t.coefficient not in self.fixed)

    @property
    def powers(self) -> tuple[Power, ...]:
        """The powers whose exponents are fitted, in order, each exponent once."""
        found = {p.exponent: p for t in self.terms for p in t.powers}
        return tuple(p for name, p in found.items() if name not in self.fixed)

    @property
    def constants(self) -> tuple[str, ...]:
        """The constants that are fitted: each coefficient, then its exponents."""
        names = (n for t in self.terms for n in (t.coefficient, *(p.exponent for p in t.powers)))
        return tuple(name for name in dict.fromkeys(names) if name not in self.fixed)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of runs that differ in the law; empty if one law holds for all."""
        return tuple(dict.fromkeys(t.kind for t in self.terms if t.kind is not None))


_E = Term("E")
_A = Term("A", (Power("alpha", SIZE),))
_EXTENDED = (Power("beta", LENGTH), Power("gamma", SIZE, grid=GAMMA_GRID))
_CONTINUED = (Power("beta'", LENGTH), Power("gamma", SIZE, grid=GAMMA_GRID))

PLAIN = Form("plain", "E + A/N^alpha + B/D^beta", (_E, _A, Term("B", (Power("beta", LENGTH),))))
EXTENDED = Form("extended", "E + A/N^alpha + B/(D^beta N^gamma)", (_E, _A, Term("B", _EXTENDED)))
JOINT = Form(
    "joint",
    "scratch: E + A/N^alpha + B/D^beta; continued: E + A/N^alpha + B'/(D^beta' N^gamma)",
    (
        _E,
        _A,
        Term("B", (Power("beta", LENGTH),), "scratch"),
        Term("B'", _CONTINUED, "continued"),
    ),
)


def frozen_form(constants: Mapping[str, float]) -> Form:
    """Return the joint form with all constants of the law from scratch fixed.

    This is how arXiv 2407.02118 fits continued training.

    Args:
        constants: of the plain law, fitted to runs from scratch.
    """
    return replace(JOINT, name="frozen", fixed={k: constants[k] for k in PLAIN.constants})


@dataclass(frozen=True)
class Basis:
    """A form on given runs: log term k of run i is ``offset[k, i] + design[k, i] @ theta``.

    theta has the fitted constants in the form's order, of the coefficients the logarithms at the
    center of the runs.
    """

    form: Form
    design: Array
    """[terms, runs, constants]"""
    offset: Array
    """[terms, runs]; -inf where a run does not have the term."""
    to_reported: Array
    """[constants, constants]: theta to logarithms of coefficients (at N = D = 1) and exponents."""

    def loss(self, theta: Array) -> Array:
        """Return the losses: [runs]."""
        with np.errstate(over="ignore"):
            return np.exp(self.offset + self.design @ theta).sum(0)

    def log_loss(self, theta: Array) -> Array:
        """Return the logarithms of the losses, also where the losses overflow: [runs]."""
        logs = self.offset + self.design @ theta
        top = logs.max(0)
        return top + np.log(np.exp(logs - top).sum(0))

    def log_jacobian(self, theta: Array) -> Array:
        """Return the derivatives of the logarithms of the losses: [runs, constants]."""
        logs = self.offset + self.design @ theta
        parts = np.exp(logs - logs.max(0))
        return np.einsum("kn,knp->np", parts / parts.sum(0), self.design)

    def constants(self, theta: Array) -> dict[str, float]:
        """Return all constants by name, the fixed ones included."""
        return dict(self.form.fixed) | dict(
            zip(self.form.constants, map(float, self.values(theta)), strict=True)
        )

    def values(self, theta: Array) -> Array:
        """Return the fitted constants, one row per row of theta: [..., constants]."""
        reported = theta @ self.to_reported.T
        return np.where(self.is_log, np.exp(reported), reported)

    def theta(self, constants: Mapping[str, float]) -> Array:
        """Return theta of given constants, the inverse of `constants`."""
        values = np.array([constants[name] for name in self.form.constants])
        with np.errstate(divide="ignore"):
            logs = np.where(self.is_log, np.log(np.where(self.is_log, values, 1.0)), values)
        return np.linalg.solve(self.to_reported, logs)

    @property
    def is_log(self) -> Array:
        """Whether theta has the logarithm of the constant: [constants]."""
        return np.isin(self.form.constants, self.form.coefficients)

    def take(self, rows: Array) -> Basis:
        """Return the same basis on some of the runs."""
        return replace(self, design=self.design[:, rows], offset=self.offset[:, rows])


def basis_of(form: Form, runs: Sequence[RunRecord], like: Basis | None = None) -> Basis:
    """Return the basis of a form on runs.

    Args:
        form: the law.
        runs: at least one.
        like: take theta's meaning from this basis of the same form, not from the runs' center.
    """
    index = {name: i for i, name in enumerate(form.constants)}
    design = np.zeros((len(form.terms), len(runs), len(index)))
    offset = np.zeros(design.shape[:2])
    to_reported = np.eye(len(index))
    for k, term in enumerate(form.terms):
        active = np.array([term.active(run) for run in runs])
        offset[k] = np.where(active, 0.0, -np.inf)
        free = term.coefficient in index
        if free:
            design[k, :, index[term.coefficient]] = 1.0
        else:
            offset[k] += np.log(form.fixed[term.coefficient])
        for power in term.powers:
            values = np.array([power.variable.log(run) for run in runs])
            if power.exponent not in index:
                offset[k] += power.sign * form.fixed[power.exponent] * values
                continue
            center = 0.0
            if free:
                place = index[term.coefficient], index[power.exponent]
                center = float(np.mean(values)) if like is None else _center(like, place, power)
                to_reported[place] -= power.sign * center
            design[k, :, index[power.exponent]] += power.sign * (values - center)
    return Basis(form, design, offset, to_reported)


def _center(like: Basis, place: tuple[int, int], power: Power) -> float:
    return -power.sign * float(like.to_reported[place])


def losses_of(runs: Sequence[RunRecord], metric: str) -> Array:
    """Return the measured losses: [runs].

    Args:
        runs: of a table.
        metric: ``loss`` or ``bits_per_byte``.

    Raises:
        ConfigError: a run lacks it.
    """
    values = [getattr(run, metric) for run in runs]
    lacking = next((run.name for run, v in zip(runs, values, strict=True) if v is None), None)
    if lacking is not None:
        raise ConfigError(f"{metric}: run {lacking!r} has none; add the column, or leave it out")
    return np.array(values, dtype=float)
