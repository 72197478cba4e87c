"""The bound of the plan, (m - 1) / 2 samples for m domains: it holds for curricula chosen against
it, and no method can promise less.
"""

import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.curriculum import BlendPlan, apportion
from megatron_chatflow.curriculum.apportion import (
    Apportionment,
    _apportion,
    _apportion_few,
    _apportion_one,
    _nearest,
)
from megatron_chatflow.curriculum.ramps import CONSTANT
from tests.curriculum.cases import (
    make_curriculum,
    make_plan,
    named,
    quick,
    running_counts,
    stage_lists,
)

ROUNDING = 1e-6
"""What float64 may add to errors of samples in runs this short."""


def amended(plan: BlendPlan, at: int, shares: np.ndarray) -> BlendPlan:
    names = [f"d{i:03d}" for i in range(len(shares))]
    return plan.amend(
        at=at, curriculum=make_curriculum([{"at": 0, "weights": named(shares)}], names)
    )


@pytest.mark.parametrize("size", [2, 3, 5, 9, 10])
@pytest.mark.parametrize("length", [1, 32])
def test_an_adversary_reaches_the_bound_and_no_more(size, length):
    """The two domains that are nearest to each other get shares that drive them a sample apart
    whichever of them is chosen.

    Only they may be chosen, so any method ends with all domains a sample apart, the outermost (size
    - 1) / 2 off: the bound cannot be improved.
    """
    rng = np.random.default_rng(size)
    plan, target, n, worst = (
        amended(make_plan([{"at": 0, "weights": named(np.ones(size))}], 10**6), 0, np.ones(size)),
        np.zeros(size),
        0,
        0.0,
    )
    for _ in range(40 + 30 * size):
        error = plan.counts(n) - target
        order = np.argsort(error, kind="stable")
        gaps = np.diff(error[order])
        pair = int(gaps.argmin()) if gaps.min() < 0.999 else int(rng.integers(size - 1))
        shares = np.zeros(size)
        shares[order[pair + 1]] = (length // 2 + (min(gaps[pair], 0.999) + 1) / 2) / length
        shares[order[pair]] = 1 - shares[order[pair + 1]]
        plan = amended(plan, n, shares)
        n, target = n + length, target + shares * length
        worst = max(worst, float(np.abs(plan.counts(n) - target).max()))
    assert worst <= (size - 1) / 2 + ROUNDING
    assert worst > (size - 1) / 2 - 0.35


@pytest.mark.parametrize("size", [3, 4, 6, 128])
def test_the_sums_of_the_largest_errors_are_bounded_for_curricula_searched_against_the_plan(size):
    """What the proof shows: the j domains that are furthest ahead are together at most j (m - j) /
    2 ahead, at every sample.
    """
    rng = np.random.default_rng(size)
    j = np.arange(size + 1)
    plan, target, n = (
        make_plan([{"at": 0, "weights": named(np.ones(size))}], 10**7),
        np.zeros(size),
        0,
    )
    for _ in range(60):
        choices = []
        for _ in range(6):
            length, kind = int(rng.choice([1, 2, 3, 8, 32, 200])), rng.integers(3)
            shares = (
                rng.dirichlet(np.full(size, 0.3)) * (rng.random(size) < 0.6) + (kind == 2) * 1e-4
            )
            shares[rng.choice(size, 1 + int(kind == 1), replace=False)] += rng.random() + 1e-3
            shares /= shares.sum()
            next_plan = amended(plan, n, shares)
            error = next_plan.counts(n + length) - target - shares * length
            choices.append((float((error**4).sum()), length, shares, next_plan))
        _, length, shares, plan = max(choices, key=lambda choice: choice[0])
        counts = plan.counts(n) + running_counts(plan.locate(n, n + length)[0], size)
        errors = counts - target - np.arange(length + 1)[:, None] * shares
        sums = np.concatenate([np.zeros((length + 1, 1)), np.sort(errors)[:, ::-1].cumsum(1)], 1)
        assert (sums <= j * (size - j) / 2 + ROUNDING).all()
        assert np.abs(errors).max() <= (size - 1) / 2 + ROUNDING
        n, target = n + length, target + shares * length


@quick(60)
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_samples_go_to_the_domains_that_are_most_behind_within_the_limits(size, seed):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 6, (40, size))
    high = low + rng.integers(0, 5, (40, size))
    total = rng.integers(low.sum(1), high.sum(1) + 1)
    target = low + rng.normal(0, 3, (40, size))
    counts = _apportion(target, low, high, total)
    assert (counts.sum(1) == total).all() and (counts >= low).all() and (counts <= high).all()
    error = counts - target
    ahead = np.where(counts > low, error, -math.inf).max(1)
    behind = np.where(counts < high, error, math.inf).min(1)
    assert (ahead <= behind + 1 + 1e-12).all()
    alone = [
        _apportion_one(t, _nearest(t), a, b, int(n))
        for t, a, b, n in zip(target, low, high, total, strict=True)
    ]
    assert np.array_equal(counts, alone)
    lists = [
        (t.tolist(), _nearest(t).tolist(), a.tolist(), b.tolist(), int(n))
        for t, a, b, n in zip(target, low, high, total, strict=True)
    ]
    assert counts.tolist() == [_apportion_few(*row) for row in lists]


@quick(30)
@given(stage_lists(3000, sizes=(1, 2, 4, 7, 24), most=12), st.integers(0, 3000))
def test_few_domains_are_apportioned_in_plain_python_as_in_numpy(stages, n):
    plan = make_plan(stages, 3000)
    with mock.patch.object(apportion, "_FEW", 0):
        other = make_plan(stages, 3000)
        order, counts = other.locate(0, 3000), other.counts(n)
    assert all(np.array_equal(a, b) for a, b in zip(plan.locate(0, 3000), order, strict=True))
    assert np.array_equal(plan.counts(n), counts)
    assert np.array_equal(counts, np.bincount(order[0][:n], minlength=len(counts)))


@quick(8)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=9), st.data())
def test_counts_are_those_of_the_definition_in_exact_arithmetic(parts, data):
    """The points 1, 2, 4, 8, ... one from another, then middles from both sides, with fractions
    instead of float64.
    """
    parts = [*parts, 1 << 20]  # shares in units of 2^-21, so that float64 is exact
    parts[-1] = (1 << 21) - sum(parts[:-1])
    shares = [Fraction(part, 1 << 21) for part in parts]
    order = Apportionment(
        np.array([float(s) for s in shares]),
        np.array([float(s) for s in shares]),
        CONSTANT,
        0,
        np.zeros(len(parts)),
    )
    known = {0: [0] * len(parts)}

    def share_out(point, low, high):
        counts = [
            min(max(math.floor(s * point + Fraction(1, 2)), a), b)
            for s, a, b in zip(shares, low, high, strict=True)
        ]
        while sum(counts) != point:
            errors = [c - s * point for c, s in zip(counts, shares, strict=True)]
            if sum(counts) < point:
                counts[min((e, i) for i, e in enumerate(errors) if counts[i] < high[i])[1]] += 1
            else:
                counts[max((e, i) for i, e in enumerate(errors) if counts[i] > low[i])[1]] -= 1
        return counts

    point = 1
    while point <= 4096:
        known[point] = share_out(point, known[point // 2], [1 << 40] * len(parts))
        point *= 2
    half = 1024
    while half:
        for middle in range(half, 4096, 2 * half):
            if middle not in known:
                known[middle] = share_out(middle, known[middle - half], known[middle + half])
        half //= 2
    for n in [
        0,
        1,
        2,
        3,
        1023,
        1024,
        1025,
        4095,
        *(data.draw(st.integers(0, 4095)) for _ in range(20)),
    ]:
        assert order.counts(n).tolist() == known[n]
    start = data.draw(st.integers(0, 3000))
    domains, ordinals = order.locate(start, start + 1000)
    expected = [
        next(d for d in range(len(parts)) if known[n + 1][d] > known[n][d])
        for n in range(start, start + 1000)
    ]
    assert domains.tolist() == expected
    assert ordinals.tolist() == [
        known[n][d] for n, d in zip(range(start, start + 1000), expected, strict=True)
    ]
