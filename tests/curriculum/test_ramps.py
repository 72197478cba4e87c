"""Compiled ramps against closed forms and the standard library."""

import math

import numpy as np
import pytest

from megatron_chatflow.curriculum.ramps import _power, _sine, pacing, valid_ramp, without
from tests.curriculum.cases import RAMPS, ramp_value


def closed_integral(ramp: str, s: np.ndarray) -> np.ndarray:
    if ramp == "step":
        return s * 0
    if ramp == "linear":
        return s * s / 2
    if ramp == "cosine":
        return s / 2 - np.sin(math.pi * s) / (2 * math.pi)
    if ramp == "geometric":
        return ((128**s - 1) / math.log(128) - s) / 127
    q = 1 / float(ramp.removeprefix("root"))
    return s ** (q + 1) / (q + 1)


@pytest.mark.parametrize("ramp", [*RAMPS[1:], "root1", "root10"])
@pytest.mark.parametrize("width", [1, 7, 1000, 2 * 10**6, 10**11])
def test_a_compiled_ramp_and_its_integral_follow_the_definition(ramp, width):
    p, s = pacing(ramp, width), np.linspace(0, 1, 997)
    assert np.abs(p.area(s * width) - width * closed_integral(ramp, s)).max() < 1e-7 * width
    assert np.abs(p.at(s * width) - ramp_value(ramp, s)).max() < 2e-4
    assert (p.values[0], p.values[-1]) == (0, 1)
    assert (np.diff(p.knots) > 0).all() and (np.diff(p.values) >= 0).all()
    assert (p.values * 2**40 == np.rint(p.values * 2**40)).all()


def test_a_step_stays_where_it_is():
    assert pacing("step", 100).at(np.array([0.0, 50.0, 99.0])).tolist() == [0, 0, 0]


def test_sine_and_power_agree_with_the_standard_library():
    x = np.linspace(0, math.pi / 2, 1001)
    assert np.abs(_sine(x) - [math.sin(v) for v in x]).max() < 1e-15
    x = np.linspace(0, 1, 101)
    for exponent in (0.25, 1 / 3, 1.0, 1.5, 2.0, 7.3):
        assert np.abs(_power(x, exponent) - [v**exponent for v in x]).max() < 1e-11


def test_handing_shares_on_in_proportion_is_again_a_ramp():
    a, b = np.array([0.1, 0.6, 0.3]), np.array([0.5, 0.1, 0.4])
    for ramp in ("linear", "cosine"):
        before = pacing(ramp, 5000)
        after = without(before, a[:2].sum(), b[:2].sum())
        x = np.linspace(0, 5000, 301)
        p, q = before.at(x)[:, None], after.at(x)[:, None]
        expected = ((1 - p) * a + p * b)[:, :2]
        expected /= expected.sum(1, keepdims=True)
        assert np.allclose(
            (1 - q) * a[:2] / a[:2].sum() + q * b[:2] / b[:2].sum(), expected, atol=1e-6
        )


@pytest.mark.parametrize(
    "name", ["step", "linear", "cosine", "geometric", "root2", "root1.5", "root0.5"]
)
def test_names_of_ramps_are_known(name):
    assert valid_ramp(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Linear",
        "root",
        "root0",
        "root-2",
        "root2x",
        "root1e3",
        "root1000",
        "root<p>",
        "sqrt",
        "rootnan",
    ],
)
def test_other_names_are_not(name):
    assert not valid_ramp(name)
