"""The contract of the blend: every property for curricula of every kind, against integrals computed
from the definitions.
"""

import hashlib
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.curriculum import BlendPlan, Curriculum
from megatron_chatflow.curriculum.ledger import READ_VERSIONS
from megatron_chatflow.errors import ChatflowError
from tests.curriculum.cases import (
    assert_counted_up,
    integrals,
    make_curriculum,
    make_plan,
    named,
    quick,
    running_counts,
    share_at,
    stage_lists,
    weights,
    worst_window,
)

N = 1600


@quick(100)
@given(stage_lists(N, most=40))
def test_counts_are_within_4_samples_of_the_integral_and_windows_within_6(stages):
    plan = make_plan(stages, N)
    domains, ordinals = plan.locate(0, N)
    counts = running_counts(domains, len(plan.domain_names))
    errors = counts - integrals(stages, plan.domain_names, N)
    assert np.abs(errors).max() <= 4
    assert worst_window(errors) <= 6
    assert_counted_up(domains, ordinals, np.zeros(len(plan.domain_names), np.int64))
    for n in (0, 1, N // 3, N - 1, N):
        assert np.array_equal(plan.counts(n), counts[n])


@quick(60)
@given(weights(128), st.integers(0, 10**8))
def test_the_bounds_hold_for_128_domains_anywhere_in_a_constant_blend(values, start):
    plan = make_plan([{"at": 0, "weights": named(values)}], 10**8 + 2000)
    domains, _ = plan.locate(start, start + 1500)
    shares = values / values.sum()
    errors = (
        plan.counts(start)
        + running_counts(domains, 128)
        - (start + np.arange(1501)[:, None]) * shares
    )
    assert np.abs(errors).max() <= 4
    assert worst_window(errors) <= 6


def test_many_small_domains_that_are_due_at_the_same_moment_do_not_disturb_a_large_one():
    golden = 0.6180339887498949
    phases = (0.5 + np.arange(1, 128) * golden) % 1
    for offset in (0.5, 1.5, phases, 1 + phases):
        values = np.empty(128)
        values[1:] = (offset + np.zeros(127)) / 1000
        values[0] = 1 - values[1:].sum()
        plan = make_plan([{"at": 0, "weights": named(values)}], 3000)
        errors = running_counts(plan.locate(0, 3000)[0], 128) - np.arange(3001)[:, None] * values
        assert np.abs(errors).max() <= 4
        assert worst_window(errors) <= 6


@quick(60)
@given(stage_lists(N), st.data())
def test_any_range_is_the_cut_of_a_longer_one(stages, data):
    plan = make_plan(stages, N)
    domains, ordinals = plan.locate(0, N)
    for _ in range(5):
        start = data.draw(st.integers(0, N))
        stop = data.draw(
            st.integers(start, min(N, start + data.draw(st.sampled_from((1, 16, 1000)))))
        )
        a, b = plan.locate(start, stop)
        assert a.dtype == b.dtype == np.int64
        assert np.array_equal(a, domains[start:stop])
        assert np.array_equal(b, ordinals[start:stop])


@quick(60)
@given(stage_lists(N))
def test_a_domain_gets_a_sample_only_where_its_share_is_positive(stages):
    plan = make_plan(stages, N)
    domains, _ = plan.locate(0, N)
    assert (
        share_at(stages, plan.domain_names, np.arange(N) + 0.0)[np.arange(N), domains] > 0
    ).all()
    assert all(plan.shares(n)[domains[n]] > 0 for n in range(0, N, 29))


@quick(30)
@given(stage_lists(N))
def test_shares_are_what_the_stages_say(stages):
    plan = make_plan(stages, N)
    points = np.unique(
        np.clip([0, 1, N // 3, N - 1, N, *(s["at"] + d for s in stages for d in (-1, 0, 1))], 0, N)
    )
    expected = share_at(stages, plan.domain_names, points + 0.0)
    found = np.array([plan.shares(int(n)) for n in points])
    assert np.abs(found - expected)[points < N].max() < 1e-3
    assert np.allclose(found.sum(1), 1, atol=1e-12)


@quick(30)
@given(stage_lists(N), st.randoms(use_true_random=False), st.integers(1, 100))
def test_neither_the_order_of_the_file_nor_the_batch_size_plays_a_part(stages, random, batch):
    names = list(stages[0]["weights"])
    random.shuffle(names)
    shuffled = [
        {**stage, "weights": {name: stage["weights"][name] * 3 for name in names}}
        for stage in stages
    ]
    plan = make_plan(stages, N)
    other = BlendPlan(
        make_curriculum(shuffled, names), num_samples=N, global_batch_size=batch, seq_length=16
    )
    assert other.domain_names == plan.domain_names
    assert np.array_equal(other.locate(0, N), plan.locate(0, N))
    assert other.fingerprint() == plan.fingerprint()


@quick(30)
@given(stage_lists(N), st.integers(N, 10**12))
def test_a_longer_run_with_absolute_knots_leaves_the_past_unchanged(stages, longer):
    plan, extended = make_plan(stages, N), make_plan(stages, longer)
    assert np.array_equal(plan.locate(0, N), extended.locate(0, N))
    assert plan.first_difference(extended, N) is None


@quick(30)
@given(stage_lists(N), st.data())
def test_what_a_stage_says_decides_nothing_before_the_stage_above_it(stages, data):
    edited = data.draw(st.integers(1, len(stages)))
    size = len(stages[0]["weights"])
    stage = {
        "at": (stages[edited]["at"] if edited < len(stages) else stages[-1]["at"] + 50),
        "weights": named(data.draw(weights(size))),
    }
    changed = [*stages[:edited], stage]
    end = min(N, changed[edited - 1]["at"])
    assert np.array_equal(make_plan(stages, N).locate(0, end), make_plan(changed, N).locate(0, end))


def test_percentages_and_all_clocks_mean_the_same_places():
    def plan(clock, *at):
        stages = [
            {"at": a, "weights": w}
            for a, w in zip((0, *at), ({"a": 1}, {"a": 1, "b": 3}, {"b": 1}), strict=True)
        ]
        return make_plan(stages, 1000, clock=clock)

    expected = plan("samples", 400, 640)
    for other in (
        plan("iterations", 50, 80),
        plan("tokens", 6400, 10240),
        plan("samples", "40%", "64 %"),
        plan("tokens", "40%", 10240.0),
    ):
        assert other.stages == expected.stages
        assert np.array_equal(other.locate(0, 1000), expected.locate(0, 1000))
        assert other.fingerprint() == expected.fingerprint()


@quick(15)
@given(weights(4), weights(4), st.sampled_from((1, 10**6, 10**10 + 7, 10**11 - 1)))
def test_runs_of_a_hundred_billion_samples_keep_every_property(before, after, start):
    length = 10**11
    plan = make_plan(
        [{"at": 0, "weights": named(before)}, {"at": 9 * 10**10, "weights": named(after)}], length
    )
    stop = min(length, start + 700)
    domains, ordinals = plan.locate(start, stop)
    counts = plan.counts(start) + running_counts(domains, 4)
    assert np.array_equal(counts[-1], plan.counts(stop))
    assert counts[0].sum() == start
    assert_counted_up(domains, ordinals, counts[0])
    w = [
        [Fraction(float(v)) / sum(map(Fraction, map(float, values))) for v in values]
        for values in (before, after)
    ]
    for n in (start, stop):
        x, rest = Fraction(min(n, 9 * 10**10)), max(n - 9 * 10**10, 0)
        exact = [
            a * x + (b - a) * x * x / (18 * 10**10) + b * rest for a, b in zip(*w, strict=True)
        ]
        assert max(abs(int(c) - e) for c, e in zip(plan.counts(n), exact, strict=True)) <= 4
    assert np.array_equal(plan.locate(start + 1, stop)[1], ordinals[1:])


def test_shares_that_stand_in_a_simple_ratio_take_turns():
    plan = make_plan([{"at": 0, "weights": {"a": 1, "b": 1}}], 8)
    assert plan.locate(0, 8)[0].tolist() in ([0, 1] * 4, [1, 0] * 4)
    plan = make_plan([{"at": 0, "weights": {"a": 3, "b": 1}}], 400)
    assert all(
        part.tolist() == [3, 1] for part in map(np.bincount, plan.locate(0, 400)[0].reshape(-1, 4))
    )
    plan = make_plan([{"at": 0, "weights": named(np.ones(128))}], 1280)
    assert all((np.bincount(part) == 1).all() for part in plan.locate(0, 1280)[0].reshape(-1, 128))


def test_the_order_of_every_version_is_pinned():
    """A change here is order-changing: raise PLAN_VERSION, and say so in the CHANGELOG. Runs of
    version 1 keep their order, amendments included.
    """
    ramps = ("linear", "cosine", "root2", "root3.5", "geometric", "step")
    stages = [
        {
            "at": i * 150,
            "weights": named((np.arange(7) * (i + 2) + i) % 5 + 0.1 * i),
            "ramp": ramps[i % 6],
        }
        for i in range(7)
    ]
    digests = {}
    for version in READ_VERSIONS:
        ledger = json.loads(make_plan(stages, 10**9).to_json())
        plan = BlendPlan.from_json(json.dumps({**ledger, "version": version}))
        plan = plan.amend(
            at=1000,
            curriculum=make_curriculum([{"at": 0, "weights": {"d002": 1, "new": 2, "d005": 4.5}}]),
        )
        assert plan.version == json.loads(plan.to_json())["version"] == version
        located = [plan.locate(0, 2000), plan.locate(10**9 - 500, 10**9)]
        digests[version] = hashlib.sha256(
            b"".join(part.astype("<i8").tobytes() for pair in located for part in pair)
        ).hexdigest()
    assert digests == {
        1: "91b8530743ff81510a27c7027c74fac71f707b3066335da06ec4da2e6c81d237",
        2: "acf6e0d4e146e529ed61620d62bf96223ae294876e553c56311fdb994cb56ff3",
    }


def test_stages_are_named_in_samples():
    plan = make_plan(
        [
            {"name": "first", "at": 0, "weights": {"a": 1}},
            {"name": "second", "at": "50%", "weights": {"b": 1}},
        ],
        100,
    )
    assert plan.stages == [("first", 0), ("second", 50)]
    assert [plan.stage_at(n) for n in (0, 49, 50, 99)] == ["first", "first", "second", "second"]
    assert "first from 0, second from 50" in repr(plan)


def test_the_curriculum_of_a_plan_makes_the_same_plan():
    plan = make_plan(
        [
            {"at": 0, "weights": {"a": 1, "b": 2}},
            {"at": "37%", "weights": {"b": 1}, "ramp": "cosine"},
        ],
        1000,
    )
    assert isinstance(plan.curriculum, Curriculum)
    again = BlendPlan(plan.curriculum, num_samples=1000, global_batch_size=1, seq_length=16)
    assert again.fingerprint() == plan.fingerprint()


def test_samples_outside_of_the_run_are_refused():
    plan = make_plan([{"at": 0, "weights": {"a": 1}}], 10)
    for call in (
        lambda: plan.locate(-1, 3),
        lambda: plan.locate(3, 11),
        lambda: plan.locate(5, 4),
        lambda: plan.counts(11),
        lambda: plan.shares(-1),
    ):
        with pytest.raises(IndexError, match="not within the run's 10"):
            call()
    assert plan.locate(10, 10)[0].shape == (0,)


@pytest.mark.parametrize(
    "sizes",
    [{"num_samples": 0}, {"global_batch_size": -1}, {"seq_length": 2.5}, {"num_samples": True}],
)
def test_a_size_that_is_no_positive_whole_number_is_refused(sizes):
    with pytest.raises(ChatflowError, match=f"{next(iter(sizes))}: .* give at least 1"):
        BlendPlan(
            make_curriculum([{"at": 0, "weights": {"a": 1}}]),
            **{"num_samples": 10, "global_batch_size": 1, "seq_length": 1, **sizes},
        )


@pytest.mark.parametrize(
    ("at", "length"), [(("40%", "41%"), 10), (("40%", 300), 1000), ((400, "40%"), 1000)]
)
def test_stages_that_fall_out_of_order_in_this_run_are_refused(at, length):
    stages = [{"at": a, "weights": {"a": 1}} for a in (0, *at)]
    with pytest.raises(
        ChatflowError,
        match=(
            r"test.yaml: stages \(stage2\).at: in a run of \d+ samples it begins at .* move one "
            r"of them, or lengthen"
        ),
    ):
        make_plan(stages, length)
