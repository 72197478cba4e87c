"""Fits of laws: exact on tables without noise, and equal to scipy's own on tables with noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit, minimize

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.forms import (
    EXTENDED,
    JOINT,
    PLAIN,
    Form,
    basis_of,
    frozen_form,
    losses_of,
)
from megatron_chatflow.planner.laws.solver import fit_law
from tests.planner.laws.tables import EXTENDED_LAW, JOINT_LAW, PLAIN_LAW, grid, measured

KINDS = {"plain": ["scratch"], "extended": ["continued"], "joint": ["scratch", "continued"]}
EXPONENT = st.floats(0.12, 0.7)
PART = st.floats(0.05, 1.5)


def constants_of(form: Form, draw: st.DataObject) -> dict[str, float]:
    """Constants whose terms are nats at N = 500M, D = 10B."""
    found = {p.exponent: draw.draw(EXPONENT, p.exponent) for p in form.powers}
    if "gamma" in found:
        found["gamma"] = draw.draw(st.floats(-0.3, 0.1), "gamma")
    values = {"N": 5e8, "D": 1e10}
    for term in form.terms:
        size = draw.draw(st.floats(0.5, 3) if term.coefficient == "E" else PART, term.coefficient)
        factors = [values[p.variable.name] ** found[p.exponent] for p in term.powers]
        found[term.coefficient] = size * float(np.prod(factors))
    return found


@pytest.mark.parametrize("form", [PLAIN, EXTENDED, JOINT], ids=lambda form: form.name)
@settings(max_examples=8, deadline=None)
@given(draw=st.data())
def test_a_table_without_noise_gives_the_constants_to_six_digits(
    form: Form, draw: st.DataObject
) -> None:
    truth = constants_of(form, draw)
    fit = fit_law(form, measured(form, truth, grid(kinds=KINDS[form.name])))
    assert fit.constants == pytest.approx(truth, rel=1e-6, abs=1e-7)


def test_a_table_without_noise_gives_the_free_constants_of_the_frozen_form() -> None:
    runs = measured(JOINT, JOINT_LAW, grid(kinds=["continued"]))
    fit = fit_law(frozen_form(PLAIN_LAW), runs)
    assert fit.form.constants == ("B'", "beta'", "gamma")
    assert fit.constants == pytest.approx(JOINT_LAW, rel=1e-6)


def test_the_fit_is_the_one_of_scipys_curve_fit_from_the_true_constants() -> None:
    runs = measured(PLAIN, PLAIN_LAW, grid(), noise=0.003)
    n, d = (np.array([getattr(run, name) for run in runs]) for name in ("params", "tokens"))

    def log_loss(_: object, e: float, a: float, alpha: float, b: float, beta: float) -> np.ndarray:
        return np.log(np.exp(e) + np.exp(a) / n**alpha + np.exp(b) / d**beta)

    start = [np.log(1.82), np.log(482), 0.348, np.log(2085), 0.366]
    losses = np.log(losses_of(runs, "loss"))
    theirs, covariance = curve_fit(log_loss, n, losses, start, xtol=1e-12, ftol=1e-12)
    ours = fit_law(PLAIN, runs).constants
    theirs[[0, 1, 3]] = np.exp(theirs[[0, 1, 3]])
    assert list(ours.values()) == pytest.approx(theirs, rel=1e-4)


def test_the_huber_fit_is_the_minimum_that_nelder_mead_finds() -> None:
    runs = measured(PLAIN, PLAIN_LAW, grid(), noise=0.01, seed=3)
    fit = fit_law(PLAIN, runs, huber=1e-3)
    n, d = (np.array([getattr(run, name) for run in runs]) for name in ("params", "tokens"))
    losses = np.log(losses_of(runs, "loss"))

    def cost(x: np.ndarray) -> float:
        r = np.abs(
            np.log(np.exp(x[0]) + np.exp(x[1]) / n ** x[2] + np.exp(x[3]) / d ** x[4]) - losses
        )
        return float(np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum())

    c = fit.constants
    start = np.array([np.log(c["E"]), np.log(c["A"]), c["alpha"], np.log(c["B"]), c["beta"]])
    assert cost(start) == pytest.approx(fit.cost, rel=1e-9)
    options = {"xatol": 1e-10, "fatol": 1e-16, "maxfev": 4000}
    better = minimize(cost, start, method="Nelder-Mead", options=options)
    assert better.fun >= fit.cost * (1 - 1e-4)


@pytest.mark.parametrize("form", [PLAIN, EXTENDED, JOINT], ids=lambda form: form.name)
def test_the_jacobian_is_the_derivative_of_the_log_loss(form: Form) -> None:
    basis = basis_of(form, grid(kinds=["scratch", "continued"]))
    theta = basis.theta(JOINT_LAW)
    steps = 1e-6 * np.eye(len(theta))
    slopes = [(basis.log_loss(theta + h) - basis.log_loss(theta - h)) / 2e-6 for h in steps]
    assert basis.log_jacobian(theta) == pytest.approx(np.array(slopes).T, abs=1e-8)
    assert np.exp(basis.log_loss(theta)) == pytest.approx(basis.loss(theta))


def test_the_loss_of_a_form_is_its_formula() -> None:
    (scratch, continued) = grid([1e8], [1e10], ["scratch", "continued"])
    c = JOINT_LAW
    base = c["E"] + c["A"] / 1e8 ** c["alpha"]
    basis = basis_of(JOINT, [scratch, continued])
    assert basis.loss(basis.theta(c)) == pytest.approx(
        [
            base + c["B"] / 1e10 ** c["beta"],
            base + c["B'"] / (1e10 ** c["beta'"] * 1e8 ** c["gamma"]),
        ]
    )


def test_a_fit_predicts_runs_that_it_has_not_seen() -> None:
    fit = fit_law(EXTENDED, measured(EXTENDED, EXTENDED_LAW, grid()))
    far = grid([7e10], [1e13])
    basis = basis_of(EXTENDED, far)
    assert fit.predict(far) == pytest.approx(basis.loss(basis.theta(EXTENDED_LAW)), rel=1e-9)


def test_a_term_that_the_runs_do_not_have_vanishes() -> None:
    truth = {**PLAIN_LAW, "E": 1e-9}
    assert fit_law(PLAIN, measured(PLAIN, truth, grid())).vanished == ("E",)


def test_exponents_stay_positive_where_the_loss_rises_with_the_size() -> None:
    rises = measured(PLAIN, {**PLAIN_LAW, "alpha": -0.3, "A": 1e-3}, grid(), noise=0.003)
    assert fit_law(PLAIN, rises).constants["alpha"] >= 0


def test_too_few_runs_and_runs_without_the_metric_are_refused() -> None:
    runs = measured(PLAIN, PLAIN_LAW, grid())
    with pytest.raises(ConfigError, match="5 runs for 5 constants"):
        fit_law(PLAIN, runs[:5])
    with pytest.raises(ConfigError, match=r"bits_per_byte: run 'scratch 0x0' has none"):
        fit_law(PLAIN, runs, "bits_per_byte")
