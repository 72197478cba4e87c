"""Designs that do not determine a law are refused, and the runs proposed for them repair that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_chatflow.planner.laws.design import (
    DesignError,
    best_candidates,
    check_design,
    grid_of_candidates,
    nominal,
)
from megatron_chatflow.planner.laws.forms import EXTENDED, JOINT, PLAIN, Form, basis_of, losses_of
from megatron_chatflow.planner.laws.run_table import RunRecord
from tests.planner.laws.tables import EXTENDED_LAW, JOINT_LAW, PLAIN_LAW, grid, measured

MANY = np.geomspace(5e7, 5e9, 12)


def on_line(tokens: float, power: float = 1.0, kind: str = "scratch") -> list[RunRecord]:
    runs = grid(MANY, [1], [kind])
    return [replace(run, tokens=round(tokens * run.params**power)) for run in runs]


def rounded(runs: list[RunRecord]) -> list[RunRecord]:
    """The same runs with lengths of full batches, up to 2% off."""
    return [replace(r, tokens=round(r.tokens * (1 + 0.02 * (-1) ** i))) for i, r in enumerate(runs)]


REFUSED = {
    "D = 20 N": (PLAIN, on_line(20), "every run has D = 20 N, so alpha and beta"),
    "D = 20 N in batches": (PLAIN, rounded(on_line(20)), "D = 20 N, so alpha and beta"),
    "a power": (EXTENDED, on_line(3, 0.7), r"D = 3 N\^0.70, so beta and gamma"),
    "one size": (PLAIN, grid([1e9], MANY), r"one size \(N = 1B\), so alpha and A"),
    "one length": (PLAIN, grid(MANY, [1e10]), r"one length \(D = 10B\), so beta and B"),
    "two sizes": (PLAIN, grid([1e8, 1e9]), "of 2 sizes and 4 lengths .* E, A and alpha"),
    "two lengths": (EXTENDED, grid(lengths=[1e9, 1e10]), "E, B and beta cannot"),
    "five runs": (PLAIN, grid()[:5], "5 runs for the 5 constants"),
    "both on lines": (
        JOINT,
        on_line(20) + on_line(20, kind="continued"),
        "every continued run has D = 20 N, so beta' and gamma",
    ),
    "continued on a line": (JOINT, grid() + on_line(5, kind="continued"), "beta' and gamma"),
    "continued of one size": (
        JOINT,
        grid() + grid([1e9], MANY, ["continued"]),
        "every continued run has one size .* gamma and B'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_design_that_does_not_determine_the_law_is_refused_and_can_be_repaired(name: str) -> None:
    form, runs, message = REFUSED[name]
    runs = measured(form, JOINT_LAW if form is JOINT else EXTENDED_LAW, runs)
    with pytest.raises(DesignError, match=message):
        check_design(form, runs)
    basis = basis_of(form, runs)
    theta = nominal(basis, losses_of(runs, "loss"))
    candidates = grid_of_candidates(form, runs)
    proposals = best_candidates(basis, theta, runs, candidates, 3)
    assert [p.shrinks for p in proposals] == sorted((p.shrinks for p in proposals), reverse=True)
    repaired = [*runs, *(replace(p.run, loss=3.0) for p in proposals)]
    check_design(form, repaired)
    most = max(run.params * run.tokens for run in runs)
    assert all(p.run.params * p.run.tokens <= 1.001 * most for p in proposals)


@pytest.mark.parametrize(
    ("form", "runs"),
    [
        (PLAIN, grid()),
        (EXTENDED, grid()),
        (JOINT, grid(kinds=("scratch", "continued"))),
        (JOINT, on_line(20) + grid(kinds=["continued"])),
        (PLAIN, grid(np.geomspace(1e8, 1e9, 3), np.geomspace(1e9, 1e10, 3))),
    ],
)
def test_a_grid_of_three_sizes_and_lengths_is_enough(form: Form, runs: list[RunRecord]) -> None:
    check_design(form, measured(form, JOINT_LAW if form is JOINT else EXTENDED_LAW, runs))


def test_a_kind_that_the_table_lacks_is_named() -> None:
    with pytest.raises(DesignError, match="no run is continued, so B', beta' and gamma"):
        check_design(JOINT, measured(PLAIN, PLAIN_LAW, grid()))


def test_the_first_proposed_run_is_the_best_single_run_of_a_brute_force_search() -> None:
    runs = measured(PLAIN, PLAIN_LAW, grid())
    basis = basis_of(PLAIN, runs)
    theta = basis.theta(PLAIN_LAW)
    candidates = grid_of_candidates(PLAIN, runs)
    (best,) = best_candidates(basis, theta, runs, candidates, 1)

    def volume(extra: RunRecord) -> float:
        j = basis_of(PLAIN, [*runs, extra], like=basis).log_jacobian(theta) / 0.003
        prior = np.diag([0.25 if log else 1 / 0.09 for log in basis.is_log])
        return float(np.linalg.slogdet(j.T @ j + prior)[1])

    assert volume(best.run) == pytest.approx(max(map(volume, candidates)), abs=1e-9)
