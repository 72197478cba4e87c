"""The D-CPT law: recovered from its closed form, and refused where it is not determined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.dcpt import check_design, fit_dcpt
from megatron_chatflow.planner.laws.run_table import RunRecord

TRUE = {
    "E": 1.6,
    "A": 300.0,
    "alpha": 0.33,
    "B": 900.0,
    "eta": 0.7,
    "beta": 0.35,
    "C": 0.12,
    "eps": 0.05,
    "gamma": 0.8,
}


def loss(n: float, d: float, r: float) -> float:
    t = TRUE
    size, length = t["A"] / n ** t["alpha"], t["B"] * r ** t["eta"] / d ** t["beta"]
    return t["E"] + size + length + t["C"] / (r + t["eps"]) ** t["gamma"]


def runs(
    sizes: tuple[float, ...] = (1e7, 1e8, 1e9),
    lengths: tuple[float, ...] = (2e8, 2e9, 2e10),
    shares: tuple[float, ...] = (0.1, 0.2, 0.35, 0.6, 1.0),
    noise: float = 0.0,
) -> list[RunRecord]:
    rng = np.random.default_rng(1)
    return [
        RunRecord(
            f"{n:g}-{d:g}-{r:g}",
            int(n),
            int(d),
            loss(n, d, r) * float(np.exp(noise * rng.normal())),
            share=r,
        )
        for n in sizes
        for d in lengths
        for r in shares
    ]


def test_constants_of_noiseless_losses_are_recovered_to_six_digits() -> None:
    law = fit_dcpt("t.csv", "zh", runs())
    for name, value in TRUE.items():
        assert law.constants[name] == pytest.approx(value, rel=1e-6), name


def test_with_one_size_the_loss_is_recovered_and_its_term_is_in_e() -> None:
    law = fit_dcpt("t.csv", "zh", runs(sizes=(1e8,)))
    assert set(law.constants) == set(TRUE) - {"A", "alpha"} and law.one_size == 10**8
    assert float(law.predict(1e8, 1e11, 0.5)) == pytest.approx(loss(1e8, 1e11, 0.5), rel=1e-6)


def test_predictions_and_intervals_with_noise() -> None:
    law = fit_dcpt("t.csv", "zh", runs(noise=0.003))
    low, high = law.interval(1e9, 1e11, 0.3)
    assert low < loss(1e9, 1e11, 0.3) < high and high / low < 1.05
    inside = [a <= TRUE[name] <= b for name, (a, b) in law.constant_intervals().items()]
    assert sum(inside) >= 7


def test_the_slope_is_the_derivative_by_the_share() -> None:
    law = fit_dcpt("t.csv", "zh", runs())
    up, down = (float(law.predict(1e8, 1e10, 0.3 + step)) for step in (1e-5, -1e-5))
    assert law.slope(1e8, 1e10, 0.3) == pytest.approx((up - down) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (runs(shares=(0.3,)), "runs of 1 shares cannot determine eta, C, eps and gamma"),
        (runs(sizes=(1e7, 1e8)), "runs of 2 sizes cannot determine A and alpha"),
        (runs(lengths=(1e9,)), "runs of 1 lengths cannot determine B and beta"),
        (
            [r for n, d in ((1e7, 2e8), (1e8, 2e9), (1e9, 2e10)) for r in runs((n,), (d,))],
            "the length of every run is in proportion to its size",
        ),
        ([replace(run, share=None) for run in runs()], "has no share; fill the column"),
        (runs()[:3] + runs()[18:21] + runs()[39:43], "10 runs cannot determine the 9 constants"),
    ],
)
def test_tables_that_cannot_determine_the_law_are_refused(
    table: list[RunRecord], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_design("t.csv", "zh", table)
    assert str(error.value).startswith("t.csv: zh: ")
