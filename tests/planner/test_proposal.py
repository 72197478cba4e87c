"""Proposals: within caps and floors, optimal, and refused where caps and floors contradict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.mixture_law import MixtureLaw
from megatron_chatflow.planner.proposal import (
    KL_WEIGHT,
    REPEATS,
    Problem,
    Stage,
    effective_shares,
    solve,
)

ONE = (Stage("all", 1.0, {"x": 1.0}),)


def law(rates: list[float], saturation: list[float] | None = None) -> MixtureLaw:
    size = len(rates)
    return MixtureLaw(
        "x",
        tuple(f"d{i}" for i in range(size)),
        2.0,
        np.array(rates),
        np.array(saturation or [0.0] * size),
        "exponential",
        0.0,
        np.zeros(1),
        np.zeros((1, 1 + 2 * size)),
    )


def problem(rates: list[float], **more: object) -> Problem:
    size = len(rates)
    values = {
        "domains": tuple(f"d{i}" for i in range(size)),
        "laws": {"x": law(rates)},
        "stages": ONE,
        "prior": np.full(size, 1 / size),
        "floors": np.zeros(size),
        "caps": np.ones(size),
        "new_text": np.full(size, np.inf),
        **more,
    }
    return Problem(**values)  # pyright: ignore[reportArgumentType] (by name)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    size, stages = draw(st.integers(2, 7)), draw(st.integers(1, 3))
    part = st.floats(0.0, 1.0)
    rates = [draw(st.floats(-3, 3)) for _ in range(size)]
    bends = [draw(st.floats(0, 2)) for _ in range(size)]
    floors = np.array([draw(part) for _ in range(size)]) * draw(part)
    floors = floors / max(floors.sum(), 1.0)
    caps = np.minimum(1.0, floors + [draw(part) for _ in range(size)])
    assume(caps.sum() >= 1.0)
    prior = np.array([draw(st.floats(0.01, 1.0)) for _ in range(size)])
    lengths = np.array([draw(st.floats(0.1, 1.0)) for _ in range(stages)])
    second = law([draw(st.floats(-3, 3)) for _ in range(size)])
    weights = [draw(part) for _ in range(stages)]
    return problem(
        rates,
        laws={"x": law(rates, bends), "y": second},
        stages=tuple(
            Stage(str(i), float(length), {"x": w, "y": 1 - w})
            for i, (length, w) in enumerate(zip(lengths / lengths.sum(), weights, strict=True))
        ),
        prior=prior / prior.sum(),
        floors=floors,
        caps=caps,
        new_text=caps / 4,
    )


@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(problems())
def test_proposals_respect_caps_and_floors_and_are_optimal(given_problem: Problem) -> None:
    found = solve(given_problem)
    assert (found.shares >= given_problem.floors - 1e-12).all()
    assert (found.average(given_problem) <= given_problem.caps + 1e-9).all()
    np.testing.assert_allclose(found.shares.sum(axis=1), 1.0, atol=1e-9)
    assert found.optimality < 1e-3


def test_a_proposal_is_no_worse_than_any_mixture_of_a_fine_grid() -> None:
    base = problem(
        [0.5, -1.5, 0.0],
        laws={"x": law([0.5, -1.5, 0.0], [0.4, 0.0, 0.2])},
        floors=np.array([0.1, 0.0, 0.05]),
        caps=np.array([1.0, 0.55, 1.0]),
    )
    best = np.inf
    for a in np.arange(0.1, 1.0001, 0.01):
        for b in np.arange(0.0, min(0.55, 0.95 - a) + 1e-9, 0.01):
            x = np.array([a, b, 1 - a - b])
            logs = np.log(np.maximum(x, 1e-300) * 3)
            best = min(
                best,
                float(base.laws["x"].value_and_gradient(x, x, x * 0 + 1)[0] + KL_WEIGHT * x @ logs),
            )
    assert solve(base).objective <= best + 1e-9


def test_without_effect_of_the_shares_the_prior_is_proposed() -> None:
    prior = np.array([0.2, 0.5, 0.3])
    found = solve(problem([0.0, 0.0, 0.0], prior=prior))
    np.testing.assert_allclose(found.shares[0], prior, atol=1e-4)


def test_stages_move_toward_their_weights_and_share_one_cap() -> None:
    stages = (Stage("first", 0.4, {"x": 1.0}), Stage("second", 0.6, {"y": 1.0}))
    laws = {"x": law([-2.0, 0.0]), "y": law([0.0, -2.0])}
    free = solve(problem([0, 0], laws=laws, stages=stages))
    assert free.shares[0, 0] > 0.9 and free.shares[1, 1] > 0.9
    capped = problem([0, 0], laws=laws, stages=stages, caps=np.array([1.0, 0.3]))
    found = solve(capped)
    assert found.average(capped)[1] == pytest.approx(0.3, abs=1e-6)
    assert found.at_cap == ("d1",)


def test_repeated_text_is_worth_what_the_discount_says() -> None:
    x, new = np.array([0.05, 0.4, 0.55]), np.array([0.1, 0.1, 0.55])
    effective, slope = effective_shares(x, new)
    fourth = 0.1 * (1 + REPEATS * (1 - np.exp(-3 / REPEATS)))
    np.testing.assert_allclose(effective, [0.05, fourth, 0.55])
    np.testing.assert_allclose(slope, [1.0, np.exp(-3 / REPEATS), 1.0])
    assert 0.36 < fourth < 0.38


def test_repetition_lowers_the_proposed_share() -> None:
    plenty = solve(problem([0.0, -1.5])).shares[0, 1]
    scarce = solve(problem([0.0, -1.5], new_text=np.array([np.inf, 0.02]))).shares[0, 1]
    assert scarce < plenty - 0.02


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (
            {"floors": np.array([0.5, 0.0]), "caps": np.array([0.2, 1.0])},
            ["floor d0=0.5 is above its cap of 0.2 (4 epochs)", "lower the floor"],
        ),
        (
            {"floors": np.array([0.6, 0.7])},
            ["the floors d0=0.6 + d1=0.7 add up to 1.3, above 1"],
        ),
        (
            {"caps": np.array([0.2, 0.3])},
            ["the caps allow shares of 0.5 in all (d0 0.2, d1 0.3)", "raise --max-epochs"],
        ),
        (
            {"floors": np.array([0.1, 0.0]), "prior": np.array([0.0, 1.0])},
            ["floor d0=0.1 and prior d0=0 contradict each other"],
        ),
    ],
)
def test_contradictory_caps_and_floors_are_named(more: dict, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        solve(problem([0.0, 0.0], reasons={"d0": "4 epochs"}, **more))
    assert all(part in str(error.value) for part in parts)
