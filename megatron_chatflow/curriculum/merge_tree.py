"""The order of version 1, kept for runs that began with it: domains merged pairwise, in a tree, by
the times at which their samples are due.

A node of the tree stands for a set of domains. Its share is the sum of theirs; its sample number j
is due when the integral of its share reaches j + 1/2. The samples of a node are those of its two
children in order of due time, and nothing else decides: a node's m-th sample is found by one search
among two sorted sequences, and sample n of the blend by walking from the root to a leaf. Each
pairing puts a node off its schedule by at most half a sample, besides what it inherits from its
parent, of which it takes the part that its share is of the parent's. A tree of depth d is therefore
off by at most d / 2 anywhere, whatever the shares are: 128 domains, depth at most 8, at most 4
samples. (With all domains merged at once, half a sample for each domain can add up: one of 0.9
among 127 small ones is then off by 9.)

Due times are float64. A node is due at most once a sample, so neighbouring due times are at least
one sample apart, and rounding (of the integral, below 1e-4 up to 10^12 samples) cannot put them in
another order; `locate` and `counts` compare the very same numbers, so they agree exactly.
"""

from __future__ import annotations

import heapq

import numpy as np

from megatron_chatflow.curriculum.ramps import Pacing

TOLERANCE = 0.25
"""Samples by which a domain may stay off its schedule on account of the set it is in."""


class MergeTree:
    """The order of samples among domains whose shares move from `before` to `after`.

    Args:
        before, after: shares on a binary grid, so that their sums are exact: float64 [K]; each
        domain has a positive sum of both. pacing: how the shares move, as a function of x, the
        samples since the knot before. Outside of the pacing's knots, where due times may
            reach at both ends of a piece, a share is taken as the mean of before and after.
        origin: x at the first sample of the piece.
        owed: samples by which each domain is behind at `origin` (negative: ahead), adding up to 0:
        float64 [K].
    """

    def __init__(
        self, before: np.ndarray, after: np.ndarray, pacing: Pacing, origin: float, owed: np.ndarray
    ) -> None:
        self.size = len(before)
        self.pacing = pacing
        self.left, self.right = _pair(before + after)
        owed = self._settled(owed)
        before, after = self._with_sums(before), self._with_sums(after)
        self.before, self.rise = before, after - before
        self.mean = (before + after) / 2
        self.top = before * (pacing.knots[-1] - pacing.integral[-1]) + after * pacing.integral[-1]
        start = pacing.area(np.asarray(float(origin)))
        self.offset = owed - (before * (origin - start) + after * start)
        self.root = len(before) - 1

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain (its number among the K) and ordinal of samples start .. stop - 1, all counted
        from the start of the piece: int64 [n] each.
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
        """How many of the first n samples of the piece each domain gets: int64 [K]."""
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
        """How many of a node's first m samples are its left child's, and whether the next one is;
        the left child goes first at equal times.
        """
        left, right = self.left[node], self.right[node]
        x = self._due(node, m - 0.5)
        area = self.pacing.area(x)
        lefts = np.floor(self.offset[left] + self.before[left] * x + self.rise[left] * area + 0.5)
        lefts = np.clip(lefts, 0, m).astype(np.int64)
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
        """The time x at which a node's integral reaches j + 1/2."""
        target = (j + 0.5) - self.offset[node]
        pacing, mean = self.pacing, self.mean[node]
        cells = len(pacing.knots) - 1
        if not cells:
            return target / mean
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
        position, value = pacing.knots[low], pacing.values[low]
        share = before + rise * value
        width = pacing.knots[low + 1] - position
        slope = rise * (pacing.values[low + 1] - value) / width
        missing = np.maximum(inner - (before * position + rise * pacing.integral[low]), 0.0)
        divisor = share + np.sqrt(np.maximum(share * share + 2 * slope * missing, 0.0))
        within = np.minimum(
            2 * missing / np.where(divisor > 0, divisor, 1.0), width
        )  # where the share goes to 0, rounding may lead beyond
        return position + within + (target - inner) / mean

    def _settled(self, owed: np.ndarray) -> np.ndarray:
        """What each node makes up for. A domain: all it is owed. A set of domains: its sum, less
        what each of them can go on owing or being owed.

        Domains that are half a sample ahead or behind are as they should be; of many that are put
        together anew, such halves may add up to several samples, which must not be taken from, or
        given to, the one large domain among them.
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
    """A tree over K leaves: the children of each node, leaves first (-1), then inner nodes, the
    root last: int64 [2 K - 1] each.

    Huffman's tree, so that large domains meet few others on their way; its depth is limited to that
    of a full tree and one more, by giving small weights a floor until it holds.
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
