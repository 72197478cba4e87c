"""What a domain gives, when it runs out, and who takes over."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.curriculum import (
    BlendPlan,
    capacities,
    check_exhaustion,
    forecast,
    share_curve,
)
from megatron_chatflow.errors import ChatflowError
from tests.curriculum.cases import (
    assert_counted_up,
    make_curriculum,
    make_plan,
    quick,
    running_counts,
    share_at,
    stage_lists,
    worst_window,
)

N = 900


@quick(80)
@given(stage_lists(N, sizes=(2, 3, 4, 7, 30)), st.data())
def test_redistribute_gives_a_share_to_the_others_from_the_moment_a_domain_is_exhausted(
    stages, data
):
    names = sorted(stages[0]["weights"])
    limits = {name: data.draw(st.sampled_from((0, 1, 20, 100, 10**6))) for name in names}
    try:
        plan = make_plan(stages, N, capacities=limits, on_exhausted="redistribute")
    except ChatflowError as error:
        assert "has given all it has; shorten the run" in str(error)
        scheduled = [name for name in names if all(stage["weights"][name] for stage in stages)]
        assert sum(limits[name] for name in scheduled) < N
        return
    domains, ordinals = plan.locate(0, N)
    assert_counted_up(domains, ordinals, np.zeros(len(names), np.int64))
    capacity = np.array([limits[name] for name in names])
    counts = running_counts(domains, len(names))
    assert (counts <= capacity).all()
    fine = share_at(stages, list(names), (np.arange(N * 4) + 0.5) / 4).reshape(N, 4, len(names))
    fine *= (counts[:-1] < capacity)[:, None, :]
    fine /= fine.sum(2, keepdims=True)
    errors = counts - np.vstack([np.zeros(len(names)), fine.mean(1).cumsum(0)])
    assert np.abs(errors).max() <= 4
    assert worst_window(errors) <= 6
    assert np.array_equal(plan.locate(N // 2, N), (domains[N // 2 :], ordinals[N // 2 :]))
    assert np.array_equal(plan.counts(N // 3), counts[N // 3])


def test_capacities_that_suffice_change_nothing():
    stages = [{"at": 0, "weights": {"a": 1, "b": 2}}, {"at": 300, "weights": {"b": 1}}]
    plan, capped = (
        make_plan(stages, N, capacities=c, on_exhausted="redistribute")
        for c in (None, {"a": 300, "b": 900})
    )
    assert np.array_equal(plan.locate(0, N), capped.locate(0, N))


def test_when_every_domain_is_exhausted_the_run_is_refused_with_the_sample():
    stages = [{"at": 0, "weights": {"a": 1, "b": 1}}]
    assert make_plan(
        stages, 150, capacities={"a": 50, "b": 100}, on_exhausted="redistribute"
    ).counts(150).tolist() == [50, 100]
    with pytest.raises(
        ChatflowError,
        match=(
            r"on_exhausted: redistribute: at sample 150 every domain .*\(a, b\).*; shorten the "
            r"run"
        ),
    ):
        make_plan(stages, 151, capacities={"a": 50, "b": 100}, on_exhausted="redistribute")
    with pytest.raises(
        ChatflowError, match="capacities: domain 'b' is missing.*; give the samples"
    ):
        make_plan(stages, 151, capacities={"a": 50}, on_exhausted="redistribute")
    with pytest.raises(ChatflowError, match="capacities: -1 of domain 'b' is negative; give"):
        make_plan(stages, 151, capacities={"a": 50, "b": -1}, on_exhausted="redistribute")


def test_an_amendment_counts_what_was_given_before_against_the_capacity():
    plan = make_plan(
        [{"at": 0, "weights": {"a": 1, "b": 1}}],
        200,
        capacities={"a": 60, "b": 10**6},
        on_exhausted="redistribute",
    )
    curriculum = make_curriculum(
        [{"at": 0, "weights": {"a": 3, "b": 1}}], on_exhausted="redistribute"
    )
    assert plan.amend(at=50, curriculum=curriculum).counts(200).tolist() == [60, 140]
    assert plan.amend(at=50, curriculum=curriculum, capacities={"a": 30, "b": 500}).counts(
        200
    ).tolist() == [30, 170]
    kept = plan.amend(at=50, curriculum=curriculum, capacities={"a": 10, "b": 500})
    assert kept.counts(200)[0] == kept.counts(50)[0] == 25


def test_capacities_are_epochs_times_samples_and_one_epoch_without_a_cap():
    curriculum = make_curriculum(
        [{"at": 0, "weights": {"a": 1, "b": 1, "c": 1}}], max_epochs={"a": 4, "b": 0.29}
    )
    assert capacities(curriculum, {"a": 7, "b": 100, "c": 5}) == {"a": 28, "b": 29, "c": 5}


EPOCHS = {"a": 100, "b": 50}
HALVES = [{"name": "one", "at": 0, "weights": {"a": 1, "b": 1}}]


def test_a_forecast_counts_samples_tokens_and_epochs_by_domain_and_by_stage():
    stages = [
        *HALVES,
        {"name": "two", "at": 100, "weights": {"a": 1, "b": 3}, "ramp": "step"},
        {"name": "three", "at": 200, "weights": {"b": 1}},
    ]
    plan = make_plan(stages, 300)
    f = forecast(plan, EPOCHS)
    a, b = f.domains
    counts = plan.counts(300)
    assert (a.name, a.samples, a.tokens, a.epochs, a.exhausted_at) == (
        "a",
        counts[0],
        counts[0] * 16,
        counts[0] / 100,
        None,
    )
    assert b.samples == counts[1]
    assert [(s.stage, s.domain, s.start, s.stop) for s in f.stages][::2] == [
        ("one", "a", 0, 100),
        ("two", "a", 100, 200),
        ("three", "a", 200, 300),
    ]
    one, two = f.stages[0], f.stages[2]
    assert (one.samples, one.tokens, one.epochs, one.share) == (50, 800, 0.5, 0.5)
    assert (two.share_start, two.share_end, round(two.share, 3)) == (
        0.25,
        pytest.approx(0.0025),
        0.125,
    )
    assert sum(s.samples for s in f.stages) == f.end == 300
    assert "b is read 4.7 times: beyond 4 epochs" in f.warnings[0]


@quick(60)
@given(
    stage_lists(N, sizes=(2, 5)), st.integers(1, 300), st.sampled_from(("stop", "error", "repeat"))
)
def test_a_domain_runs_out_at_the_sample_that_asks_for_one_more_than_it_has(stages, epoch, mode):
    names = sorted(stages[0]["weights"])
    plan = make_plan(stages, N, on_exhausted=mode, max_epochs={names[0]: 1.5})
    f = forecast(plan, dict.fromkeys(names, epoch))
    domains, ordinals = plan.locate(0, N)
    expected = {}
    for i, name in enumerate(names):
        limit = int(1.5 * epoch) if i == 0 else None if mode == "repeat" else epoch
        asked = np.flatnonzero((domains == i) & (ordinals == limit)) if limit is not None else []
        expected[name] = int(asked[0]) if len(asked) else None
    assert {d.name: d.exhausted_at for d in f.domains} == expected
    early = [n for n in expected.values() if n is not None]
    assert f.end == (min(early, default=N) if mode == "stop" else N)
    if early and mode != "stop":
        with pytest.raises(
            ChatflowError, match="domains.d.*: the run reads it .* lower its weights"
        ):
            check_exhaustion(plan, dict.fromkeys(names, epoch))
    else:
        check_exhaustion(plan, dict.fromkeys(names, epoch))


def test_stop_ends_the_run_at_the_sample_that_cannot_be_served():
    f = forecast(make_plan(HALVES, 300, on_exhausted="stop"), EPOCHS)
    assert f.end in (100, 101)
    assert "the run ends at sample" in f.warnings[0]
    assert f.domains[1].samples == 50


def test_redistribute_is_foretold_with_the_sample_from_which_others_take_over():
    plan = make_plan(HALVES, 140, capacities=EPOCHS, on_exhausted="redistribute")
    f = forecast(plan, EPOCHS)
    assert f.domains[1].samples == 50
    assert (
        plan.counts(f.domains[1].exhausted_at)[1]
        == 50
        > plan.counts(f.domains[1].exhausted_at - 1)[1]
    )
    assert f.domains[0].exhausted_at is None
    check_exhaustion(plan, EPOCHS)
    with pytest.raises(
        ChatflowError,
        match=(
            "domains.b: the plan draws 70 samples and it can give 50; make the plan with capacities"
        ),
    ):
        check_exhaustion(make_plan(HALVES, 140, on_exhausted="redistribute"), EPOCHS)


@pytest.mark.parametrize(
    ("top", "epochs", "sentence"),
    [
        (
            {"on_exhausted": "error"},
            EPOCHS,
            (
                r"domains.b: .* 1.4 times \(70 samples of 50 an epoch\), and on_exhausted is "
                r"error.* give it"
            ),
        ),
        (
            {"on_exhausted": "error", "max_epochs": {"b": 1.2}},
            EPOCHS,
            "domains.b: .* max_epochs is 1.2; raise max_epochs",
        ),
        (
            {"max_epochs": {"a": 0.5}},
            EPOCHS,
            "domains.a: .* max_epochs is 0.5; raise max_epochs, lower its weights, shorten the run",
        ),
        (
            {"on_exhausted": "stop"},
            {"a": 100, "b": 0},
            "domains.b: the plan draws 70 samples from it and its corpus holds none; give",
        ),
    ],
)
def test_a_plan_that_asks_for_more_than_a_domain_may_give_is_refused(top, epochs, sentence):
    with pytest.raises(ChatflowError, match=sentence):
        check_exhaustion(make_plan(HALVES, 140, **top), epochs)


@pytest.mark.parametrize(
    "top",
    [
        {},
        {"on_exhausted": "error", "max_epochs": {"b": 2}},
        {"max_epochs": {"b": 1.4}},
        {"on_exhausted": "stop"},
    ],
)
def test_a_plan_within_its_means_is_let_through(top):
    check_exhaustion(make_plan(HALVES, 140, **top), EPOCHS)


def test_warnings_name_domains_without_samples_and_stages_beyond_the_run():
    plan = make_plan(
        [*HALVES, {"name": "late", "at": 500, "weights": {"c": 1}, "ramp": "step"}], 100
    )
    assert forecast(plan, {**EPOCHS, "c": 5}).warnings == (
        "c gets no sample",
        "stage late begins at sample 500, after the run's end",
    )


def test_the_share_curve_has_both_sides_of_every_stage():
    plan = make_plan(
        [*HALVES, {"name": "two", "at": 777, "weights": {"b": 1}, "ramp": "step"}], 10**6
    )
    samples, shares = share_curve(plan, 50)
    found = dict(zip(samples.tolist(), shares[:, 0].tolist(), strict=True))
    assert (found[0], found[776], found[777], found[10**6 - 1]) == (0.5, 0.5, 0.0, 0.0)
    assert (np.diff(samples) > 0).all()


def test_a_forecast_of_a_hundred_billion_samples_is_exact():
    plan = BlendPlan(
        make_curriculum(HALVES, on_exhausted="stop"),
        num_samples=10**11,
        global_batch_size=1,
        seq_length=16,
    )
    end = forecast(plan, {"a": 10**10, "b": 10**11}).end
    domain, ordinal = (int(part[0]) for part in plan.locate(end, end + 1))
    assert (plan.domain_names[domain], ordinal) == ("a", 10**10)


def test_a_cap_beyond_any_run_never_ends_a_domain():
    stages = [{"at": 0, "weights": {"a": 1, "b": 1}}]
    curriculum = make_curriculum(stages, on_exhausted="redistribute")
    for cap in (1e30, 1e300):
        domains = {
            name: dataclasses.replace(domain, max_epochs=cap)
            for name, domain in curriculum.domains.items()
        }
        capped = dataclasses.replace(curriculum, domains=domains)
        epochs = {"a": 10, "b": 10**9}
        plan = BlendPlan(
            capped,
            num_samples=N,
            global_batch_size=8,
            seq_length=16,
            capacities=capacities(capped, epochs),
        )
        assert plan.counts(N).tolist() == [N // 2, N // 2]
        assert [domain.exhausted_at for domain in forecast(plan, epochs).domains] == [None, None]
        check_exhaustion(plan, epochs)
