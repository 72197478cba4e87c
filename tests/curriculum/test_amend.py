"""Amendments: the past stays, nothing is lost or repeated, and the bound holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.curriculum import BlendPlan
from megatron_chatflow.errors import ChatflowError
from tests.curriculum.cases import (
    assert_counted_up,
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

N = 1200


@quick(60)
@given(stage_lists(N), stage_lists(N), st.integers(0, N))
def test_the_past_stays_and_the_future_is_what_the_edited_curriculum_says(stages, edited, at):
    plan = make_plan(stages, N)
    amended = plan.amend(at=at, curriculum=make_curriculum(edited))
    names = amended.domain_names
    assert names[: len(plan.domain_names)] == plan.domain_names
    domains, ordinals = amended.locate(0, N)
    assert np.array_equal(plan.locate(0, at), (domains[:at], ordinals[:at]))
    assert_counted_up(domains, ordinals, np.zeros(len(names), np.int64))
    future = share_at(edited, names, np.arange(at, N) + 0.0)
    assert (future[np.arange(N - at), domains[at:]] > 0).all()
    for n in range(at, N, 171):
        assert np.allclose(amended.shares(n), future[n - at], atol=1e-3)
    steps = (
        share_at(edited, names, (np.arange((N - at) * 4) + 0.5) / 4 + at)
        .reshape(N - at, 4, len(names))
        .mean(1)
    )
    gone = np.pad(plan.counts(at) - plan.integral(at), (0, len(names) - len(plan.domain_names)))
    errors = (
        running_counts(domains[at:], len(names))
        - np.vstack([np.zeros(len(names)), steps.cumsum(0)])
        + gone
    )
    assert np.abs(errors).max() <= 4
    assert worst_window(errors) <= 6


@pytest.mark.parametrize(
    ("size", "kind", "count"),
    [
        pytest.param(4, "any", 1000, marks=pytest.mark.slow),
        (4, "any", 200),
        (4, "sparse", 200),
        (4, "large", 200),
        (12, "sparse", 300),
        (100, "any", 100),
        (100, "large", 100),
    ],
)
def test_many_amendments_leave_the_bound_standing(size, kind, count):
    """Domains join and leave; each amendment defines a future that the next one overturns."""
    rng, length = np.random.default_rng(size), count * 60

    def some(known):
        values = rng.dirichlet(np.full(size, 0.4)) + 1e-12
        if kind == "sparse":
            values *= rng.random(size) < 0.2
            values[rng.integers(known)] += 0.1
        elif kind == "large":
            values[rng.integers(known)] += 9
        return {name: value for name, value in named(values[:known]).items() if value}

    stages = [{"at": 0, "weights": some(2)}]
    plan, at, known = make_plan(stages, length), 0, 2
    names = [f"d{i:03d}" for i in range(size)]
    given, exact, errors = np.zeros(size, np.int64), np.zeros(size), []
    for _ in range(count):
        after = min(length, at + int(rng.choice([1, 3, 16, 40, 59])))
        domains, ordinals = plan.locate(at, after)
        domains = np.array([names.index(name) for name in plan.domain_names])[domains]
        assert_counted_up(domains, ordinals, given)
        steps = exact + share_at(
            stages, names, (np.arange((after - at) * 8) + 0.5) / 8 + at
        ).reshape(after - at, 8, size).mean(1).cumsum(0)
        errors.append(given + running_counts(domains, size)[1:] - steps)
        given, exact, at = given + np.bincount(domains, minlength=size), steps[-1], after
        known = min(size, known + int(rng.random() < 0.1))
        stages = [
            {"at": 0, "weights": some(known)},
            {
                "at": at + 30,
                "weights": some(known),
                "ramp": str(rng.choice(["linear", "cosine", "step"])),
            },
        ]
        plan = plan.amend(at=at, curriculum=make_curriculum(stages))
    errors = np.concatenate(errors)
    assert len(plan.segments) == count + 1
    assert np.abs(errors).max() <= 4
    assert worst_window(errors) <= 6
    again = BlendPlan.from_json(plan.to_json())
    assert np.array_equal(again.locate(0, at), plan.locate(0, at))


@quick(30)
@given(weights(5), weights(5), st.lists(st.integers(1, N), min_size=2, max_size=4))
def test_an_amendment_that_says_the_same_changes_no_schedule(before, after, places):
    stages = [
        {"at": 0, "weights": named(before)},
        {"at": 800, "weights": named(after), "ramp": "cosine"},
    ]
    plan = amended = make_plan(stages, N)
    for at in places:
        amended = amended.amend(at=at, curriculum=make_curriculum(stages))
    for n in (0, 1, 400, 799, 800, N):
        assert np.allclose(amended.shares(n), plan.shares(n))
        assert np.allclose(amended.integral(n), plan.integral(n))


def test_what_the_edited_curriculum_says_before_the_amendment_is_not_read():
    plan = make_plan([{"at": 0, "weights": {"a": 1}}], 100)
    future = [{"at": 50, "weights": {"a": 1, "b": 1}}, {"at": 80, "weights": {"b": 1}}]
    one, two = (
        plan.amend(at=60, curriculum=make_curriculum([{"at": 0, "weights": w}, *future]))
        for w in ({"b": 1}, {"a": 5, "c": 2})
    )
    assert one.fingerprint() == two.fingerprint()
    assert one.first_difference(two, 100) is None
    assert one.stages == [("stage0", 0), ("stage1", 60), ("stage2", 80)]


def test_a_domain_that_joins_starts_at_ordinal_0_and_one_that_is_dropped_stops():
    plan = make_plan([{"at": 0, "weights": {"a": 1, "b": 1}}], 100)
    amended = plan.amend(
        at=40, curriculum=make_curriculum([{"at": 0, "weights": {"a": 1, "new": 1}}])
    )
    assert amended.domain_names == ("a", "b", "new")
    domains, ordinals = amended.locate(40, 100)
    assert set(domains.tolist()) == {0, 2}
    assert ordinals[domains == 2].tolist() == list(range(30))
    assert amended.counts(40).tolist() == [20, 20, 0]
    assert amended.shares(10).tolist() == [0.5, 0.5, 0]


def test_a_run_can_be_lengthened_and_its_batch_changed_by_an_amendment():
    plan = make_plan(
        [{"at": 0, "weights": {"a": 1}}, {"at": "50%", "weights": {"b": 1}, "ramp": "step"}], 100
    )
    curriculum = make_curriculum(
        [{"at": 0, "weights": {"a": 1}}, {"at": 20, "weights": {"b": 1}, "ramp": "step"}],
        clock="iterations",
    )
    amended = plan.amend(at=30, curriculum=curriculum, num_samples=200, global_batch_size=6)
    assert (amended.num_samples, amended.global_batch_size) == (200, 6)
    assert amended.counts(200).tolist() == [120, 80]
    assert np.array_equal(amended.locate(0, 30), plan.locate(0, 30))


def test_going_back_to_an_earlier_sample_drops_the_amendments_after_it():
    plan = make_plan([{"at": 0, "weights": {"a": 1, "b": 1}}], 100)
    b, c = (make_curriculum([{"at": 0, "weights": {"b": 1, name: 2}}]) for name in ("a", "c"))
    assert (
        plan.amend(at=60, curriculum=b).amend(at=30, curriculum=c).fingerprint()
        == plan.amend(at=30, curriculum=c).fingerprint()
    )
    assert (
        plan.amend(at=60, curriculum=b).amend(at=0, curriculum=c).locate(0, 100)[1].tolist()
        == make_plan([{"at": 0, "weights": {"b": 1, "c": 2}}], 100).locate(0, 100)[1].tolist()
    )


def test_amending_at_the_end_and_lengthening_continues_from_there():
    plan = make_plan([{"at": 0, "weights": {"a": 1, "b": 2}}], 90)
    longer = plan.amend(
        at=90, curriculum=make_curriculum([{"at": 0, "weights": {"b": 1}}]), num_samples=120
    )
    assert longer.counts(120).tolist() == [30, 90]
    same = plan.amend(at=90, curriculum=make_curriculum([{"at": 0, "weights": {"b": 1}}]))
    assert same.first_difference(plan, 90) is None
    assert BlendPlan.from_json(same.to_json()).fingerprint() == same.fingerprint()


def test_following_an_unchanged_file_after_an_amendment_is_the_same_plan():
    first, second = ([{"at": 0, "weights": {"a": 1, "b": w}}] for w in (1, 3))
    amended = make_plan(first, 100).amend(at=40, curriculum=make_curriculum(second))
    assert amended.follow(make_plan(second, 100)).fingerprint() == amended.fingerprint()
    assert amended.first_difference(amended.follow(make_plan(first, 100)), 100) >= 40
    later = amended.amend_with(at=70, plan=make_plan(first, 150))
    assert [s.start for s in later.segments] == [0, 40, 70]
    assert later.num_samples == 150
    assert np.array_equal(later.locate(0, 70), amended.locate(0, 70))


def test_an_amendment_outside_of_the_run_is_refused():
    plan, curriculum = (
        make_plan([{"at": 0, "weights": {"a": 1}}], 100),
        make_curriculum([{"at": 0, "weights": {"a": 1}}]),
    )
    for at in (-1, 101):
        with pytest.raises(
            ChatflowError, match=f"at: sample {at} is not within the plan's 100; amend"
        ):
            plan.amend(at=at, curriculum=curriculum)
    with pytest.raises(
        ChatflowError, match="num_samples: 40 is before sample 50, .* give at least 50"
    ):
        plan.amend(at=50, curriculum=curriculum, num_samples=40)
    other = BlendPlan(curriculum, num_samples=100, global_batch_size=1, seq_length=999)
    with pytest.raises(ChatflowError, match="seq_length: 999, and it was 16: .* keep 16"):
        plan.amend_with(at=50, plan=other)
