"""The benchmark of scaling-law fits runs, and shows the times that the project promises."""

from __future__ import annotations

import pytest

from tests.benchmarks.test_steps import run


@pytest.mark.slow
def test_fits_take_seconds_and_reach_the_minimum_of_lbfgs() -> None:
    found = run("benchmarks/fit_laws.py", "--rounds", "1", "--starts", "9")
    for name in ("plain", "extended", "joint", "runs_245", "runs_245_huber"):
        assert found[f"{name}_fit"] < 3 and found[f"{name}_bootstrap"] < 5, name
    assert found["objective"] <= found["objective_lbfgs"] * (1 + 1e-6)
    assert found["lbfgs_ratio"] > 2
