"""Allocation of compute: the closed forms against the paper's numbers and against searches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar, root_scalar

from megatron_chatflow.planner.laws.allocation import (
    PowerLaw,
    compute_saved,
    law_of,
    transferred_tokens,
)
from megatron_chatflow.planner.laws.forms import JOINT, PLAIN
from megatron_chatflow.planner.laws.solver import fit_law
from tests.planner.laws.tables import JOINT_LAW, PLAIN_LAW, grid, measured

SCRATCH = PowerLaw(1.55, 420.0, 0.40, 719.5, 0.30)
CONTINUED = PowerLaw(1.55, 420.0, 0.40, 433.3, 0.20, 0.08)
LAW = st.builds(
    PowerLaw,
    E=st.floats(0.5, 3),
    A=st.floats(5, 5e3),
    alpha=st.floats(0.15, 0.6),
    B=st.floats(5, 5e3),
    beta=st.floats(0.15, 0.6),
    gamma=st.floats(-0.3, 0.1),
)
BUDGET = st.floats(1e17, 1e26)


def test_the_printed_constants_give_the_printed_allocation() -> None:
    assert SCRATCH.exponents == pytest.approx((0.429, 0.571), abs=5e-4)
    assert CONTINUED.exponents == pytest.approx((0.385, 0.615), abs=5e-4)
    for law, (n, d) in ((SCRATCH, (0.324, 0.514)), (CONTINUED, (4.79, 0.035))):
        assert law.best(1.0) == (pytest.approx(n, abs=6e-3), pytest.approx(d, abs=6e-4))


@given(LAW, BUDGET)
def test_no_other_split_of_the_budget_is_better(law: PowerLaw, flops: float) -> None:
    params, tokens = law.best(flops)
    assert 6 * params * tokens == pytest.approx(flops)
    found = minimize_scalar(
        lambda x: law.loss(np.exp(x), flops / 6 / np.exp(x)),
        bounds=(np.log(params) - 3, np.log(params) + 3),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert law.best_loss(flops) <= found.fun * (1 + 1e-12)
    assert law.given_away(params * 2, flops) > 0
    assert law.given_away(params, flops) == pytest.approx(0, abs=1e-12)


@given(LAW, BUDGET)
def test_the_budget_for_a_loss_is_the_inverse_of_the_loss_for_a_budget(
    law: PowerLaw, flops: float
) -> None:
    assert law.flops_for(law.best_loss(flops)) == pytest.approx(flops, rel=1e-6)


def test_a_law_without_an_optimum_says_so() -> None:
    law = PowerLaw(1.5, 400.0, 0.3, 400.0, 0.2, 0.25)
    assert np.isnan(law.best(1e20)).all() and np.isnan(law.flops_for(2.0))
    assert SCRATCH.flops_for(1.5) == np.inf


def test_the_compute_saved_is_that_of_a_search_for_equal_loss() -> None:
    scratch, continued = law_of(JOINT_LAW), law_of(JOINT_LAW, "continued")
    assert scratch is not None and continued is not None
    goal = continued.best_loss(1e20)
    found = root_scalar(lambda x: scratch.best_loss(np.exp(x)) - goal, bracket=(30, 80))
    equal = np.exp(found.root)
    assert compute_saved(scratch, continued, 1e20) == pytest.approx(1 - 1e20 / equal, abs=1e-9)


def test_transferred_tokens_make_up_the_difference_between_the_losses() -> None:
    scratch, continued = law_of(JOINT_LAW), law_of(JOINT_LAW, "continued")
    assert scratch is not None and continued is not None
    more = transferred_tokens(scratch, continued, 1e9, 1e10)
    assert scratch.loss(1e9, 1e10 + more) == pytest.approx(continued.loss(1e9, 1e10))


def test_arrays_of_constants_are_one_law_per_entry() -> None:
    both = PowerLaw(*(np.array([getattr(SCRATCH, f), getattr(CONTINUED, f)]) for f in FIELDS))
    for entry, law in enumerate((SCRATCH, CONTINUED)):
        assert both.best(1e21)[0][entry] == pytest.approx(law.best(1e21)[0])
        assert both.flops_for(2.5)[entry] == pytest.approx(law.flops_for(2.5))


FIELDS = ("E", "A", "alpha", "B", "beta", "gamma")


def test_a_form_of_other_constants_has_no_allocation() -> None:
    assert law_of({"E": 1.0, "A": 1.0}) is None


@pytest.mark.parametrize(
    ("form", "truth"),
    [(PLAIN, PLAIN_LAW), pytest.param(JOINT, JOINT_LAW, marks=pytest.mark.slow)],
)
def test_planning_ten_times_beyond_the_largest_run_gives_little_away(form, truth) -> None:
    kinds = ("scratch", "continued") if form is JOINT else ("scratch",)
    runs = grid(kinds=kinds)
    flops = 60 * max(run.params * run.tokens for run in runs)
    true = law_of(truth, kinds[-1])
    assert true is not None
    lost = []
    for seed in range(40):
        law = law_of(fit_law(form, measured(form, truth, runs, 0.003, seed)).constants, kinds[-1])
        assert law is not None
        lost.append(true.given_away(law.best(flops)[0], flops))
    assert sum(x <= 0.001 for x in lost) >= 38
