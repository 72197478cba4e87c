"""The order of the samples in one interval of the plan.

Samples are apportioned to domains, those most behind first, at the points of a binary grid.

A domain's error is the number of its samples so far less the integral of its share. The counts at a
point of the grid are found from those at known points around it: no domain may have less than at
the point before or more than at the point after, and within these limits the domains that are most
behind get the samples. The points 1, 2, 4, 8, ... come one from another, with nothing known after
them; the middle of two neighboring points comes from both, down to single samples. So the counts at
sample n take about 2 log2(n) steps, whatever else is read, they never decrease, and what happens
later in the interval, or where it ends, decides nothing.

With m domains, no domain is ever more than (m - 1) / 2 samples off, whatever the shares, the stages
and the amendments are, and no other method can promise less. README.md has both proofs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_chatflow.curriculum.ramps import Pacing

BLOCK = 1024
"""Samples between two points whose counts are kept for the next call."""
_BLOCKS_KEPT = 64
_NO_LIMIT = 1 << 62
_FEW = 24
"""Domains up to which plain Python is quicker than numpy."""


class Apportionment:
    """The order of samples among domains whose shares move from `before` to `after`.

    Args:
        before, after: shares: float64 [K]; each domain has a positive sum of both.
        pacing: how the shares move, as a function of x, the samples since the stage began.
        origin: x at the first sample of the interval.
        owed: samples by which each domain is behind at `origin` (negative: ahead), adding up to 0:
            float64 [K].
    """

    def __init__(
        self, before: np.ndarray, after: np.ndarray, pacing: Pacing, origin: float, owed: np.ndarray
    ) -> None:
        self.before, self.after, self.pacing = before, after, pacing
        self.origin, self.owed = float(origin), owed
        self.size = len(before)
        self._area = pacing.area(np.asarray(self.origin))
        self._points = [0]  # 0, 1, 2, 4, 8, ... as far as they were needed
        self._few = self.size <= _FEW
        self._counts: list[Any] = [[0] * self.size if self._few else np.zeros(self.size, np.int64)]
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return domain (its number among the K) and ordinal of samples start .. stop - 1.

        Both are int64 [n]; all are counted from the start of the interval.
        """
        domains, ordinals = [], []
        while start < stop:
            points, counts = self._block(start)
            end = min(stop, int(points[-1]))
            counts = _refine(self._target, points, counts, start, end)[1]
            domain = np.diff(counts, axis=0).argmax(1)
            domains.append(domain)
            ordinals.append(counts[np.arange(len(domain)), domain])
            start = end
        if not domains:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(domains), np.concatenate(ordinals)

    def counts(self, n: int) -> np.ndarray:
        """Return how many of the first n samples of the interval each domain gets: int64 [K]."""
        # n is a point of the grid whose width is its lowest bit.
        return self._around(n, max(n & -n, 1))[1][0]

    def _target(self, n: np.ndarray) -> np.ndarray:
        """Return the samples that each domain should have after n samples: float64 [len(n), K].

        Those that it was owed are included.
        """
        area = (self.pacing.area(n + self.origin) - self._area)[:, None]
        return self.owed + self.before * (n[:, None] - area) + self.after * area

    def _block(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return points around sample n, at most BLOCK apart, and the counts: int64 [2], [2, K]."""
        number = n // BLOCK
        if number not in self._blocks:
            if number == 0:
                return self._around(n, BLOCK)
            if len(self._blocks) >= _BLOCKS_KEPT:
                self._blocks.clear()
            self._blocks[number] = self._around(number * BLOCK, BLOCK)
        return self._blocks[number]

    def _around(self, n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return points around sample n, at most `width` apart, and the counts: int64 [2], [2, K].

        `width` is a power of two.
        """
        # The points on the way to n: those of 1, 2, 4, 8, ... that are not known yet, then the
        # middles of ever smaller intervals around n.
        new = [1 << k for k in range(len(self._points) - 1, n.bit_length() + 1)]
        i = n.bit_length()
        first, last = (1 << i) >> 1, 1 << i
        halves = (
            1 << k for k in range((last - first).bit_length() - 2, width.bit_length() - 2, -1)
        )
        middles = [n - n % (2 * half) + half for half in halves]
        # Targets and nearest integers of all these points at once: [points, K].
        target = self._target(np.array([*new, *middles], np.int64))
        nearest = _nearest(target)
        apportion: Any  # one of two functions, each with the types of its branch
        no_limit: Any
        if self._few:
            apportion, no_limit, target, nearest = (
                _apportion_few,
                [_NO_LIMIT] * self.size,
                target.tolist(),
                nearest.tolist(),
            )
        else:
            apportion, no_limit = _apportion_one, np.full(self.size, _NO_LIMIT)
        # Points 1, 2, 4, ... each from the one before, without an upper limit.
        for j, point in enumerate(new):
            self._counts.append(apportion(target[j], nearest[j], self._counts[-1], no_limit, point))
            self._points.append(point)
        # Middles from the known points on both sides, keeping the half that holds n.
        low, high = self._counts[i : i + 2]
        for j, middle in enumerate(middles, len(new)):
            between = apportion(target[j], nearest[j], low, high, middle)
            if n < middle:
                last, high = middle, between
            else:
                first, low = middle, between
        return np.array([first, last]), np.array([low, high])


def _refine(
    target: Callable[[np.ndarray], np.ndarray],
    points: np.ndarray,
    counts: np.ndarray,
    start: int,
    stop: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Halve intervals until every sample from start to stop is a point.

    Returns the points that are left and the counts there.
    """
    while True:
        # Keep the last point at or before `start`, the first at or after `stop`, and those between.
        first = int(np.searchsorted(points, start, side="right")) - 1
        last = max(int(np.searchsorted(points, stop)), first)
        points, counts = points[first : last + 1], counts[first : last + 1]
        gaps = np.diff(points)
        if not len(gaps) or gaps.max() == 1:
            return points, counts
        # Insert the middle of every widest interval: [intervals] points, [intervals, K] counts.
        split = np.flatnonzero(gaps == gaps.max())
        middle = (points[split] + points[split + 1]) // 2
        between = _apportion(target(middle), counts[split], counts[split + 1], middle)
        points, counts = (
            np.insert(points, split + 1, middle),
            np.insert(counts, split + 1, between, axis=0),
        )


def _nearest(target: np.ndarray) -> np.ndarray:
    """Return targets rounded to the nearest integer: int64."""
    return np.floor(target + 0.5).astype(np.int64)


def _apportion_one(
    target: np.ndarray, nearest: np.ndarray, low: np.ndarray, high: np.ndarray, total: int
) -> np.ndarray:
    """Return `_apportion` of a single row, faster.

    Arrays are [K]; `nearest` is the rounded target.
    """
    counts = np.minimum(np.maximum(nearest, low), high)
    missing = total - int(np.add.reduce(counts))
    while missing > 0:
        counts[np.where(counts < high, counts - target, np.inf).argmin()] += 1
        missing -= 1
    while missing < 0:
        counts[
            len(counts) - 1 - np.where(counts > low, counts - target, -np.inf)[::-1].argmax()
        ] -= 1
        missing += 1
    return counts


def _apportion_few(
    target: list[float], nearest: list[int], low: list[int], high: list[int], total: int
) -> list[int]:
    """Return `_apportion_one` in plain Python, which is faster for a few domains."""
    counts = [a if n < a else b if n > b else n for n, a, b in zip(nearest, low, high, strict=True)]
    missing = total - sum(counts)
    while missing > 0:
        errors = [
            n - t if n < b else math.inf for n, t, b in zip(counts, target, high, strict=True)
        ]
        counts[errors.index(min(errors))] += 1
        missing -= 1
    while missing < 0:
        errors = [
            n - t if n > a else -math.inf
            for n, t, a in zip(reversed(counts), reversed(target), reversed(low), strict=True)
        ]
        counts[len(counts) - 1 - errors.index(max(errors))] -= 1
        missing += 1
    return counts


def _apportion(
    target: np.ndarray, low: np.ndarray, high: np.ndarray, total: np.ndarray
) -> np.ndarray:
    """Return integers between `low` and `high` that add up to `total`.

    They go to the domains that are most behind their target: a domain above its lower limit is at
    most 1 further ahead than any that is below its upper one.

    Args:
        target: float64 [B, K].
        low: int64 [B, K]; its sums are at most `total`.
        high: int64 [B, K]; its sums are at least `total`.
        total: int64 [B].
    """
    # Start from the rounded targets within the limits; `missing` samples per row are left, [B].
    counts = np.clip(_nearest(target), low, high)
    missing = total - counts.sum(1)
    rows = np.flatnonzero(missing)
    while len(rows):
        # One sample per row and step: to the domain most behind, or from the one most ahead.
        some = counts[rows]
        error = some - target[rows]
        more = missing[rows] > 0
        most_behind = np.where(some < high[rows], error, np.inf).argmin(1)
        most_ahead = (
            error.shape[1] - 1 - np.where(some > low[rows], error, -np.inf)[:, ::-1].argmax(1)
        )
        step = np.where(more, 1, -1)
        counts[rows, np.where(more, most_behind, most_ahead)] += step
        missing[rows] -= step
        rows = rows[missing[rows] != 0]
    return counts
