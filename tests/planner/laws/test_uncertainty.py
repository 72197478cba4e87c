"""Intervals cover the truth as often as they say; influence is what refits give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_chatflow.planner.laws.forms import EXTENDED, JOINT, PLAIN, frozen_form, losses_of
from megatron_chatflow.planner.laws.solver import fit_law
from megatron_chatflow.planner.laws.uncertainty import (
    bootstrap,
    condition_number,
    covariance,
    influences,
    left_out_error,
    leverages,
    percentiles,
    t_intervals,
)
from tests.planner.laws.tables import EXTENDED_LAW, JOINT_LAW, PLAIN_LAW, grid, measured

NOISE = 0.003
CASES = {
    "plain": (PLAIN, PLAIN_LAW, ("scratch",)),
    "extended": (EXTENDED, EXTENDED_LAW, ("continued",)),
    "joint": (JOINT, JOINT_LAW, ("scratch", "continued")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_intervals_cover_each_constant_in_88_to_99_of_100_tables(name: str) -> None:
    form, truth, kinds = CASES[name]
    hits = dict.fromkeys(truth, 0)
    for seed in range(100):
        fit = fit_law(form, measured(form, truth, grid(kinds=kinds), NOISE, seed))
        for constant, interval in t_intervals(fit).items():
            hits[constant] += interval.low <= truth[constant] <= interval.high
    assert all(88 <= count <= 99 for count in hits.values()), hits


@pytest.mark.slow
def test_freezing_the_constants_from_scratch_gives_intervals_that_are_too_narrow() -> None:
    hits: dict[str, int] = dict.fromkeys(("B'", "beta'", "gamma"), 0)
    for seed in range(100):
        runs = measured(JOINT, JOINT_LAW, grid(kinds=("scratch", "continued")), NOISE, seed)
        scratch = fit_law(PLAIN, [run for run in runs if run.kind == "scratch"])
        fit = fit_law(
            frozen_form(scratch.constants), [run for run in runs if run.kind == "continued"]
        )
        for constant, interval in t_intervals(fit).items():
            hits[constant] += interval.low <= JOINT_LAW[constant] <= interval.high
    assert min(hits.values()) < 80, hits


@pytest.mark.parametrize("name", CASES)
def test_the_bootstrap_has_the_spread_of_the_covariance(name: str) -> None:
    form, truth, kinds = CASES[name]
    fit = fit_law(form, measured(form, truth, grid(kinds=kinds), NOISE, 1))
    draws = bootstrap(fit, 100)
    deviation = np.sqrt(np.diag(covariance(fit)))
    assert draws.std(0) == pytest.approx(deviation, rel=0.35)
    assert (bootstrap(fit, 3) == bootstrap(fit, 3)).all()
    assert (bootstrap(fit, 3) != bootstrap(fit, 3, seed=1)).all()


def test_resampling_runs_keeps_the_number_of_runs_of_each_kind_and_brackets_the_estimate() -> None:
    fit = fit_law(JOINT, measured(JOINT, JOINT_LAW, grid(kinds=CASES["joint"][2]), NOISE, 2))
    draws = fit.basis.values(bootstrap(fit, 60, resample="runs"))
    for interval, value in zip(percentiles(draws), fit.constants.values(), strict=True):
        assert interval.low < value < interval.high


def test_a_constant_of_a_vanished_term_has_no_interval() -> None:
    fit = fit_law(PLAIN, measured(PLAIN, {**PLAIN_LAW, "E": 1e-12}, grid(), NOISE, 1))
    if fit.vanished == ("E",):
        assert np.isnan(t_intervals(fit)["E"].low)
    assert not np.isnan(t_intervals(fit)["beta"].low)


def test_the_condition_number_does_not_depend_on_units() -> None:
    runs = measured(PLAIN, PLAIN_LAW, grid(), NOISE)
    one = condition_number(fit_law(PLAIN, runs))
    millions = [replace(r, tokens=r.tokens * 1000, params=r.params * 10) for r in runs]
    assert condition_number(fit_law(PLAIN, millions)) == pytest.approx(one, rel=1e-4)
    assert 10 < one < 100


def test_an_outlier_is_the_most_influential_run_and_its_refit_is_the_fit_without_it() -> None:
    runs = measured(PLAIN, PLAIN_LAW, grid(), NOISE)
    runs[7] = replace(runs[7], loss=1.03 * losses_of(runs, "loss")[7])
    found = influences(fit_law(PLAIN, runs))
    assert found[0].run == runs[7] and found[0].refitted
    rest = fit_law(PLAIN, [run for run in runs if run != runs[7]])
    assert found[0].without == pytest.approx(rest.constants, rel=1e-5)
    one_step = next(entry for entry in found if not entry.refitted)
    without = fit_law(PLAIN, [run for run in runs if run != one_step.run]).constants
    assert one_step.without["beta"] == pytest.approx(without["beta"], abs=2e-3)


def test_leverages_sum_to_the_number_of_constants() -> None:
    fit = fit_law(EXTENDED, measured(EXTENDED, EXTENDED_LAW, grid(), NOISE))
    assert leverages(fit).sum() == pytest.approx(6)


def test_the_error_of_the_largest_size_is_that_of_a_fit_which_has_not_seen_it() -> None:
    runs = measured(PLAIN, PLAIN_LAW, grid(), NOISE)
    largest = max(run.params for run in runs)
    fit = fit_law(PLAIN, [run for run in runs if run.params < largest])
    kept = [run for run in runs if run.params == largest]
    errors = np.log(fit.predict(kept) / losses_of(kept, "loss"))
    found = left_out_error(PLAIN, runs, "loss", None)
    assert (found.params, found.runs) == (largest, 4)
    assert found.rms == pytest.approx(np.sqrt((errors**2).mean()))
    assert found.worst == pytest.approx(np.abs(errors).max())
