"""Rounding and scales, against torch's float8 types and exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.fp8.formats import (
    E4M3,
    E5M2,
    FLOAT32_MAX,
    Format,
    absolute_max,
    exponent_factors,
    power_of_two_above,
    round_to,
    scale_from_amax,
)

TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
FORMATS = pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)


def saturating_cast(values: torch.Tensor, form: Format) -> torch.Tensor:
    return values.clamp(-form.max, form.max).to(TORCH[form]).float()


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert ((a == b) | (a.isnan() & b.isnan())).all()


@FORMATS
def test_rounding_equals_the_saturating_cast_for_every_bfloat16_number(form: Format) -> None:
    values = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)
        .float()
    )
    assert values.isnan().any() and values.isinf().any()
    assert_same(round_to(values.clone(), form), saturating_cast(values, form))


@FORMATS
def test_rounding_equals_the_saturating_cast_for_random_float32_bits(form: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        values = torch.randint(
            -(2**31), 2**31 - 1, (1 << 21,), dtype=torch.int32, generator=generator
        ).view(torch.float32)
        assert_same(round_to(values.clone(), form), saturating_cast(values, form))


@FORMATS
def test_rounding_is_to_even_halfway_between_neighbors_and_exact_on_the_grid(
    form: Format,
) -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(TORCH[form]).float()
    grid = grid[grid.isfinite()].unique()
    middles = (grid[1:] + grid[:-1]) / 2
    for values in (
        grid,
        middles,
        torch.nextafter(middles, grid[1:]),
        torch.nextafter(middles, grid[:-1]),
    ):
        assert_same(round_to(values.clone(), form), saturating_cast(values, form))
    assert_same(round_to(grid.clone(), form), grid)


@FORMATS
def test_infinity_becomes_the_largest_value_and_nan_stays(form: Format) -> None:
    values = round_to(torch.tensor([math.inf, -math.inf, math.nan, 1e30, -0.0]), form)
    assert (
        values[:2].tolist() == [form.max, -form.max]
        and values[2].isnan()
        and values[3:].tolist() == [form.max, 0.0]
    )


@given(
    amax=st.floats(0, float(FLOAT32_MAX), width=32),
    power_of_two=st.booleans(),
    form=st.sampled_from([E4M3, E5M2]),
)
@settings(max_examples=300, deadline=None)
def test_a_scale_is_the_quotient_rounded_once_or_the_power_of_two_below_it(
    amax: float, power_of_two: bool, form: Format
) -> None:
    scale = float(scale_from_amax(torch.tensor([amax]), form.max, power_of_two=power_of_two))
    if amax == 0:
        assert scale == 1
        return
    exact = Fraction(form.max) / Fraction(amax)
    rounded = (
        float(torch.tensor(float(exact), dtype=torch.float64).float())
        if exact < Fraction(2) ** 200
        else math.inf
    )
    wanted = min(rounded, float(FLOAT32_MAX))
    if power_of_two and wanted >= 2.0**-126:
        wanted = 2.0 ** math.floor(math.log2(wanted))
        assert (
            wanted <= scale <= wanted
            or abs(math.log2(scale) - math.log2(wanted)) <= 1
            and scale <= rounded
        )
    else:
        assert scale == pytest.approx(wanted, rel=2e-7)


def test_scales_of_nothing_and_of_what_is_not_finite_are_one() -> None:
    assert scale_from_amax(torch.tensor([0.0, math.inf, math.nan]), 448.0).tolist() == [1, 1, 1]


def test_the_quotient_is_not_computed_through_a_reciprocal() -> None:
    amax = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * 100
    assert torch.equal(scale_from_amax(amax, 448.0), (448.0 / amax.double()).float())


@given(value=st.floats(2.0**-120, float(FLOAT32_MAX), width=32))
@settings(max_examples=300, deadline=None)
def test_a_block_exponent_is_the_smallest_power_of_two_that_is_not_below(value: float) -> None:
    exponent = int(power_of_two_above(torch.tensor([value]))[0])
    if exponent < 254:
        assert Fraction(value) <= Fraction(2) ** (exponent - 127)
    assert Fraction(value) > Fraction(2) ** (exponent - 128)


def test_block_exponents_at_the_ends_of_the_range() -> None:
    values = torch.tensor(
        [0.0, 2.0**-149, 2.0**-127, 2.0**-127 + 2.0**-149, 2.0**-126, 1.0, 1.5, math.inf, math.nan]
    )
    assert power_of_two_above(values).tolist() == [0, 0, 0, 1, 1, 127, 128, 254, 255]


def test_the_two_factors_of_an_exponent_undo_each_other() -> None:
    exponent = torch.arange(1, 254, dtype=torch.int32)
    down, up = exponent_factors(exponent)
    assert torch.equal(up, torch.ldexp(torch.ones(253).double(), exponent - 127).float())
    assert torch.equal(down * up, torch.ones(253))
    assert all(
        factor.isnan() for factor in exponent_factors(torch.tensor([255], dtype=torch.int32))
    )


def test_the_largest_magnitude_leaves_nan_out_and_keeps_infinity() -> None:
    assert absolute_max(torch.tensor([[-3.0, 2.0]], dtype=torch.bfloat16)) == 3
    assert absolute_max(torch.tensor([math.nan, -5.0])) == 5
    assert absolute_max(torch.tensor([math.nan])) == 0
    assert absolute_max(torch.tensor([math.nan, -math.inf])) == math.inf
