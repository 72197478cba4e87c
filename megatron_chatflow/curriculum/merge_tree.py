"""The order of version 1: domains merged pairwise, in a tree, by the times their samples are due.

It is kept for runs that began with it. A node of the tree is a set of domains. Its share is the sum
of theirs; its sample number j is due when the integral of its share reaches j + 1/2. The samples of
a node are those of its two children in order of due time, and nothing else decides: a node's m-th
sample is found by one search among two sorted sequences, and sample n of the blend by walking from
the root to a leaf. Each pairing puts a node off its schedule by at most half a sample, in addition
to what it inherits from its parent, in proportion to its part of the parent's share. A tree of
depth d is therefore off by at most d / 2 anywhere, whatever the shares are: 128 domains, depth at
most 8, at most 4 samples. (With all domains merged at once, half a sample for each domain can add
up: one of 0.9 among 127 small ones is then off by 9.)

Due times are float64. A node is due at most once per sample, so neighboring due times are at least
one sample apart, and rounding (of the integral, below 1e-4 up to 10^12 samples) cannot change their
order; `locate` and `counts` compare the very same numbers, so they agree exactly.
"""

from __future__ import annotations

import heapq

import numpy as np

from megatron_chatflow.curriculum.ramps import Pacing

TOLERANCE = 0.25
"""Samples that a domain may stay off its schedule because of the set of domains it is in."""


class MergeTree:
    """The order of samples among domains whose shares move from `before` to `after`.

    Args:
        before, after: shares on a binary grid, so that their sums are exact: float64 [K]; each
            domain has a positive sum of both.
        pacing: how the shares move, as a function of x, the samples since the stage began. Outside
            of the pacing's knots, where due times may reach at both ends of an interval, a share is
            taken as the mean of before and after.
        origin: x at the first sample of the interval.
        owed: samples by which each domain is behind at `origin` (negative: ahead), adding up to 0:
            float64 [K].
    """

    def __init__(
        self, before: np.ndarray, after: np.ndarray, pacing: Pacing, origin: float, owed: np.ndarray
    ) -> None:
        self.size = len(before)
        self.pacing = pacing
        self.left, self.right = _pair(before + after)
        owed = self._settled_debt(owed)
        before, after = self._with_sums(before), self._with_sums(after)
        self.before, self.rise = before, after - before
        self.mean = (before + after) / 2
        self.top = before * (pacing.knots[-1] - pacing.integral[-1]) + after * pacing.integral[-1]
        start = pacing.area(np.asarray(float(origin)))
        self.offset = owed - (before * (origin - start) + after * start)
        self.root = len(before) - 1

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return domain (its number among the K) and ordinal of samples start .. stop - 1.

        Both are int64 [n]; all are counted from the start of the interval.
        """
        index = np.arange(start, stop)
        node = np.full(len(index), self.root)
        if self.size == 1:
            return node, index
        walking = np.arange(len(index))
        while len(walking):
            at, m = node[walking], index[walking]
            lefts, to_left = self._split(at, m)
            node[walking] = np.where(to_left, self.left[at], self.right[at])
            index[walking] = np.where(to_left, lefts, m - lefts)
            walking = walking[node[walking] >= self.size]
        return node, index

    def counts(self, n: int) -> np.ndarray:
        """Return how many of the first n samples of the interval each domain gets: int64 [K]."""
        count = np.zeros(self.root + 1, np.int64)
        count[self.root] = n
        frontier = np.array([self.root] if self.size > 1 else [], np.int64)
        while len(frontier):
            lefts, _ = self._split(frontier, count[frontier])
            count[self.left[frontier]] = lefts
            count[self.right[frontier]] = count[frontier] - lefts
            frontier = np.concatenate([self.left[frontier], self.right[frontier]])
            frontier = frontier[frontier >= self.size]
        return count[: self.size]

    def _split(self, node: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many of a node's first m samples are its left child's, and if the next one is.

        The left child goes first at equal times. Arrays are [n], one entry per (node, m).
        """
        left, right = self.left[node], self.right[node]
        # First guess: the left child's integral at the time when the node's sample m is due, [n].
        x = self._due(node, m - 0.5)
        area = self.pacing.area(x)
        lefts = np.floor(self.offset[left] + self.before[left] * x + self.rise[left] * area + 0.5)
        lefts = np.clip(lefts, 0, m).astype(np.int64)
        # Correct it by single samples until the due times of both children agree with the split:
        # the next left sample is due after the last right one, and the other way around.
        to_left = np.empty(len(node), bool)
        rows = np.arange(len(node))
        while len(rows):
            count, total, a, b = lefts[rows], m[rows], left[rows], right[rows]
            rest = total - count
            due = self._due(
                np.concatenate([a, a, b, b]), np.concatenate([count, count - 1, rest, rest - 1])
            ).reshape(4, -1)
            more = (rest > 0) & (due[0] <= due[3])
            fewer = (count > 0) & (due[1] > due[2])
            lefts[rows] += more
            lefts[rows] -= fewer
            to_left[rows] = due[0] <= due[2]
            rows = rows[more | fewer]
        return lefts, to_left

    def _due(self, node: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return the time x at which a node's integral reaches j + 1/2: float64 [n]."""
        target = (j + 0.5) - self.offset[node]
        pacing, mean = self.pacing, self.mean[node]
        cells = len(pacing.knots) - 1
        if not cells:
            return target / mean
        # Bisection for the pacing's cell in which the integral reaches the target, int64 [n].
        inner = np.clip(target, 0.0, self.top[node])
        before, rise = self.before[node], self.rise[node]
        low = np.zeros(len(node), np.int64)
        if cells > 1:
            high = np.full(len(node), cells)
            for _ in range(cells.bit_length()):
                middle = (low + high) >> 1
                reached = before * pacing.knots[middle] + rise * pacing.integral[middle] <= inner
                low, high = np.where(reached, middle, low), np.where(reached, high, middle)
            low = np.minimum(low, cells - 1)
        # Inside the cell the share is linear, share + slope * u, so its integral is quadratic in u:
        # solve share * u + slope * u^2 / 2 = missing, in the form that is stable for small slopes.
        position, value = pacing.knots[low], pacing.values[low]
        share = before + rise * value
        width = pacing.knots[low + 1] - position
        slope = rise * (pacing.values[low + 1] - value) / width
        missing = np.maximum(inner - (before * position + rise * pacing.integral[low]), 0.0)
        divisor = share + np.sqrt(np.maximum(share * share + 2 * slope * missing, 0.0))
        # Where the share goes to 0, rounding may lead beyond the cell.
        within = np.minimum(2 * missing / np.where(divisor > 0, divisor, 1.0), width)
        return position + within + (target - inner) / mean

    def _settled_debt(self, owed: np.ndarray) -> np.ndarray:
        """Return what each node makes up for: float64 [2 K - 1].

        For a domain, that is all it is owed; for a set of domains its sum, less what each of them
        can continue to owe or to be owed. Half a sample ahead or behind is normal for a domain;
        when many are put together again, such halves may add up to several samples, which must not
        be taken from, or given to, the one large domain among them.
        """
        total, members = self._with_sums(owed), self._with_sums(np.ones(self.size))
        size = np.abs(total)
        return np.copysign(
            np.maximum(size - TOLERANCE * (members - 1), np.minimum(size, 0.5)), total
        )

    def _with_sums(self, leaves: np.ndarray) -> np.ndarray:
        values = np.zeros(len(self.left))
        values[: self.size] = leaves
        for node in range(self.size, len(values)):
            values[node] = values[self.left[node]] + values[self.right[node]]
        return values


def _pair(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Build a tree over K leaves and return the children of each node: int64 [2 K - 1] each.

    Leaves come first (-1), then inner nodes, the root last. It is Huffman's tree, so that large
    domains meet few others on their way; its depth is limited to that of a full tree plus one, by
    giving small weights a floor until it holds.
    """
    size = len(weights)
    limit = max(size - 1, 1).bit_length() + 1
    floor, largest = 0.0, float(weights.max())
    while True:
        heap = [(max(float(weight), floor), i) for i, weight in enumerate(weights)]
        heapq.heapify(heap)
        left, right, depth = [-1] * size, [-1] * size, [0] * size
        while len(heap) > 1:
            (first, a), (second, b) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (first + second, len(left)))
            left.append(b)
            right.append(a)
            depth.append(max(depth[a], depth[b]) + 1)
        if depth[-1] <= limit:
            return np.array(left, np.int64), np.array(right, np.int64)
        floor = min(largest, floor * 2) if floor else float(weights.sum()) / (16 * size)
