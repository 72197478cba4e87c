"""Quantized matrices: on the grid, never saturated by their own scale, exact in bfloat16.

They equal arithmetic over torch's float8 types.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.fp8.formats import E4M3, E5M2, Format
from megatron_chatflow.fp8.gemm import product
from megatron_chatflow.fp8.quantize import (
    by_blocks,
    by_micro_blocks,
    with_current_scale,
    with_scale,
)
from tests.fp8.emulation import arithmetic as A

TORCH = {E4M3: A.E4M3, E5M2: A.E5M2}
BLOCKS = [(1, 128), (128, 1), (128, 128)]


def matrix(rows: int, columns: int, spread: float, seed: int) -> torch.Tensor:
    """Normal values whose rows differ in size by e^spread, with zeros in between."""
    generator = torch.Generator().manual_seed(seed)
    values = (
        torch.randn(rows, columns, generator=generator)
        * (torch.randn(rows, 1, generator=generator) * spread).exp()
    )
    return (values * (torch.rand(rows, columns, generator=generator) > 0.1)).bfloat16()


MATRICES = {
    "rows": st.integers(1, 6).map(lambda n: 32 * n),
    "columns": st.integers(1, 9).map(lambda n: 32 * n),
    "spread": st.sampled_from([0.0, 2.0, 6.0]),
    "seed": st.integers(0, 1000),
    "form": st.sampled_from([E4M3, E5M2]),
}


@given(**MATRICES)
@settings(max_examples=60, deadline=None)
def test_a_current_scale_takes_the_largest_value_to_the_end_of_the_range(
    rows: int, columns: int, spread: float, seed: int, form: Format
) -> None:
    x = matrix(rows, columns, spread, seed)
    values, back = with_current_scale(x, form)
    scale = A.scale_from_amax(
        x.float().abs().max(), form.max, power_of_two=False, eps=0, at_overflow=A.FLOAT32_MAX
    )
    assert torch.equal(values.float(), A.cast(x.float() * scale, TORCH[form]).float())
    assert back == 1 / scale
    assert not x.any() or values.abs().max() == form.max


@given(**MATRICES)
@settings(max_examples=60, deadline=None)
def test_micro_blocks_equal_those_of_exponents_found_in_double_precision(
    rows: int, columns: int, spread: float, seed: int, form: Format
) -> None:
    x = matrix(rows, columns, spread, seed)
    assert torch.equal(
        by_micro_blocks(x, form, 1).float(),
        A.restore_micro_blocks(*A.cast_micro_blocks(x, TORCH[form])),
    )
    assert torch.equal(
        by_micro_blocks(x, form, 0).float(),
        A.restore_micro_blocks(*A.cast_micro_blocks(x.t(), TORCH[form])).t(),
    )


@given(**MATRICES)
@settings(max_examples=60, deadline=None)
def test_blocks_equal_those_of_torchs_float8_types_with_edges_padded(
    rows: int, columns: int, spread: float, seed: int, form: Format
) -> None:
    x = matrix(rows, columns, spread, seed)
    for block in BLOCKS:
        wanted = A.restore_blocks(
            *A.cast_blocks(x, TORCH[form], block, power_of_two=True, eps=0.0), block
        )
        assert torch.equal(by_blocks(x, form, block).float(), wanted)


@given(**MATRICES)
@settings(max_examples=40, deadline=None)
def test_no_value_moves_further_than_half_a_step_of_its_block(
    rows: int, columns: int, spread: float, seed: int, form: Format
) -> None:
    x = matrix(rows, columns, spread, seed)
    for quantized in (
        by_micro_blocks(x, form, 0),
        by_micro_blocks(x, form, 1),
        *(by_blocks(x, form, block) for block in BLOCKS),
    ):
        # A step is 2^-mantissa of the value; below the smallest normal number it is that of the
        # block's largest value, 2^17 or 2^29 further up.
        half, floor = (
            2.0 ** -(form.mantissa + 1),
            x.float().abs().max() * 2.0 ** (form.smallest_exponent - form.mantissa),
        )
        assert ((quantized.float() - x.float()).abs() <= x.float().abs() * half + floor).all()


def test_quantizing_does_not_change_its_input() -> None:
    x = matrix(128, 128, 1.0, 0)
    before = x.clone()
    with_scale(x, E4M3, torch.tensor(3.0))
    with_current_scale(x, E4M3)
    by_micro_blocks(x, E4M3, 0)
    by_blocks(x, E4M3, (128, 128))
    assert torch.equal(x, before)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_scales_and_adds_in_float32_and_rounds_once(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (
        with_current_scale(torch.randn(192, 256, generator=generator).bfloat16(), E4M3)[0]
        for _ in range(2)
    )
    bias = torch.randn(192, generator=generator).bfloat16() if with_bias else None
    scale = 1.7e-3
    exact = (a.double() @ b.double().t()) * scale + (0 if bias is None else bias.double())
    ours = product(a, b.t(), scale, bias)
    assert (
        ours != exact.bfloat16()
    ).sum() <= 4  # of 36,864: sums in float32 that come out on the other side of a tie
    assert torch.allclose(ours.double(), exact, rtol=2.0**-8, atol=1e-6)
