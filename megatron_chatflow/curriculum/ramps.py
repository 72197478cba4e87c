"""Ramps as pacing functions, compiled to knots with basic arithmetic only.

So every machine computes the same bits. A ramp is a function p(s) from 0 to 1 over s = (sample -
start of the stage before) / (distance of the two stages); the shares are (1 - p) before + p after.
Its compiled form, `Pacing`, is linear between knots, so its integral and the inverse of its
integral are known in closed form.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

RAMPS = ("step", "linear", "cosine", "root<p>", "geometric")
GEOMETRIC_START = 2.0**-7
CELLS = 4096
_GRID = 2.0**40
_ROOT = re.compile(r"root(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Pacing:
    """How far the shares have moved: linear between knots.

    Attributes:
        knots: positions in samples from the start of the stage before, increasing, the first is 0:
            float64 [M + 1]. With a single knot, the pacing is always `values[0]`.
        values: the pacing at the knots, from 0 to 1: float64 [M + 1].
        integral: of the pacing from 0 to each knot: float64 [M + 1].
    """

    knots: np.ndarray
    values: np.ndarray
    integral: np.ndarray

    @staticmethod
    def through(knots: np.ndarray, values: np.ndarray) -> Pacing:
        """Return the pacing with these knots; values are rounded to multiples of 2^-40."""
        values = np.rint(values * _GRID) / _GRID
        return Pacing(
            knots,
            values,
            np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2 * np.diff(knots))]),
        )

    def at(self, x: np.ndarray) -> np.ndarray:
        """Return the pacing at x samples after the start of the stage before; 0 <= x."""
        if len(self.knots) == 1:
            return np.full(np.shape(x), self.values[0])
        cell, u, slope = self._cell(np.minimum(x, self.knots[-1]))
        return self.values[cell] + slope * u

    def area(self, x: np.ndarray) -> np.ndarray:
        """Return the integral of the pacing from 0 to x.

        Outside of the knots it continues with slope 1/2 (see `MergeTree`).
        """
        if len(self.knots) == 1:
            return x / 2
        inner = np.minimum(np.maximum(x, 0.0), self.knots[-1])
        cell, u, slope = self._cell(inner)
        return self.integral[cell] + (self.values[cell] + slope * u / 2) * u + (x - inner) / 2

    def _cell(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cells = len(self.knots) - 1
        cell: Any = 0
        if cells > 1:
            cell = np.minimum(self.knots.searchsorted(x, side="right") - 1, cells - 1)
        return cell, x - self.knots[cell], self._slopes[cell]

    @cached_property
    def _slopes(self) -> np.ndarray:
        return np.diff(self.values) / np.diff(self.knots)


CONSTANT = Pacing.through(np.zeros(1), np.zeros(1))
"""The pacing of shares that do not move."""


def valid_ramp(ramp: str) -> bool:
    """Return whether this is the name of a ramp.

    Names are step, linear, cosine, geometric, and root<p> with a number p > 0.
    """
    match = _ROOT.fullmatch(ramp)
    return ramp in RAMPS[:3] + RAMPS[4:] or (match is not None and 2.0**-6 <= float(match[1]) <= 64)


@lru_cache(maxsize=64)
def pacing(ramp: str, width: int) -> Pacing:
    """Return the pacing of a ramp over `width` samples.

    With s from 0 to 1: linear is s; cosine is (1 - cos(pi s)) / 2; root<p> is s^(1/p), the
    competence function of Platanios et al. 2019 (arXiv 1903.09848) with start value 0; geometric is
    (c^(1-s) - c) / (1 - c) with c = 1/128, the geometric pacing 2^((1-s) log2 c) less its start
    value, so that it starts at 0; step is 0 up to the next stage. The compiled integral is off by
    less than 1e-7 of the width.
    """
    if ramp == "step":
        return CONSTANT
    cells = 1 if ramp == "linear" else CELLS
    s = np.arange(cells + 1) / cells
    if ramp == "linear":
        values = s
    elif ramp == "cosine":
        values = _sine(s * (math.pi / 2)) ** 2
    elif ramp == "geometric":
        values = (
            _power(np.full(cells + 1, 1 / GEOMETRIC_START), s) * GEOMETRIC_START - GEOMETRIC_START
        ) / (1 - GEOMETRIC_START)
    else:
        power = float(ramp.removeprefix("root"))
        s, values = (_power(s, power), s) if power > 1 else (s, _power(s, 1 / power))
    keep = np.concatenate([[True], np.diff(s) > 2.0**-40])
    s, values = s[keep], values[keep]
    return Pacing.through(s * width, np.minimum(values, 1.0))


def without(before: Pacing, left_before: float, left_after: float) -> Pacing:
    """Return the pacing of the shares that remain when some domains are gone.

    The other shares grow in proportion: (1 - p) a + p b, divided by its sum, is again a mixture of
    a / sum(a) and b / sum(b), by q = p sum(b) / ((1 - p) sum(a) + p sum(b)).

    Args:
        before: the pacing p.
        left_before: sum(a), positive.
        left_after: sum(b), positive.
    """
    if len(before.knots) == 1 or left_before == left_after:
        return before
    knots = before.knots
    if len(knots) == 2:
        knots = np.arange(CELLS + 1) / CELLS * knots[1]
    p = before.at(knots)
    return Pacing.through(knots, p * left_after / ((1 - p) * left_before + p * left_after))


def _sine(x: np.ndarray) -> np.ndarray:
    """Return sin(x) for 0 <= x <= pi/2 by its Taylor series."""
    total, term = np.zeros_like(x), x
    for k in range(1, 27, 2):
        total = total + term
        term = term * (x * x) / -((k + 1) * (k + 2))
    return total


def _power(x: np.ndarray, exponent: np.ndarray | float) -> np.ndarray:
    """Return x^exponent for x >= 0 and exponent >= 0, by products and square roots.

    The exponent is taken to 40 binary places.
    """
    exponent = np.broadcast_to(np.asarray(exponent, float), x.shape)
    integer = np.floor(exponent)
    fraction, result, base = exponent - integer, np.ones_like(x), x
    while integer.any():
        result = np.where(integer % 2 == 1, result * base, result)
        integer, base = np.floor(integer / 2), base * base
    root = x
    for _ in range(40):
        root, fraction = np.sqrt(root), fraction * 2
        bit = fraction >= 1
        result, fraction = np.where(bit, result * root, result), fraction - bit
    return result
