"""From a bfloat16 matrix to the values an FP8 kernel would see.

Every FP8 value is exact in bfloat16, so the results stay bfloat16 matrices and a bfloat16 product
with float32 accumulation is the FP8 product. Scalings of an entire tensor give (FP8 values, factor
to scale back by); scalings by block are powers of two, so those results are scaled back already.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megatron_chatflow.fp8.formats import (
    Format,
    absolute_max,
    exponent_factors,
    power_of_two_above,
    round_to,
    scale_from_amax,
)

BLOCK = 128
"""Block length of the blockwise recipe: 1 x 128 for inputs and gradients, 128 x 128 for weights."""
MICRO_BLOCK = 32
"""Block length of MXFP8."""

Scaled = tuple[torch.Tensor, torch.Tensor]
"""(FP8 values as bfloat16, float32 scalar that scales them back)."""


def with_scale(matrix: torch.Tensor, form: Format, scale: torch.Tensor) -> Scaled:
    """`matrix` times `scale`, in float32, rounded to `form`."""
    return round_to(matrix.float().mul_(scale), form).bfloat16(), scale.reciprocal()


def with_current_scale(matrix: torch.Tensor, form: Format) -> Scaled:
    """`matrix` scaled so that its own largest magnitude becomes the largest value of `form`."""
    return with_scale(matrix, form, scale_from_amax(absolute_max(matrix), form.max))


def by_micro_blocks(matrix: torch.Tensor, form: Format, dim: int) -> torch.Tensor:
    """MXFP8: blocks of 32 along `dim` (0 or 1, a multiple of 32), each with its own power of two.

    The power is never too small.

    The reciprocal of the largest value is rounded to float32 before the product, as the kernel
    does.
    """
    rows, columns = matrix.shape
    assert matrix.shape[dim] % MICRO_BLOCK == 0, f"{tuple(matrix.shape)} along {dim}"
    shape = (
        (rows // MICRO_BLOCK, MICRO_BLOCK, columns)
        if dim == 0
        else (rows, columns // MICRO_BLOCK, MICRO_BLOCK)
    )
    blocks, inner = matrix.reshape(shape), dim + 1
    down, up = exponent_factors(
        power_of_two_above(
            _magnitudes(blocks).amax(inner, keepdim=True).view(torch.bfloat16).float()
            * (1 / form.max)
        )
    )
    return round_to(blocks.float().mul_(down), form).mul_(up).bfloat16().view(rows, columns)


def by_blocks(matrix: torch.Tensor, form: Format, block: tuple[int, int]) -> torch.Tensor:
    """Blockwise: `block` rows by columns share a power of two; edges are padded with zeros.

    Rounding the factor down to a power of two may leave up to half of the range unused, and never
    saturates.
    """
    height, width = block
    rows, columns = matrix.shape
    padded = (
        pad(matrix, (0, -columns % width, 0, -rows % height))
        if rows % height or columns % width
        else matrix
    )
    blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    amax = (
        _magnitudes(blocks).amax(3, keepdim=True).amax(1, keepdim=True)
        if width > 1
        else _magnitudes(blocks).amax(1, keepdim=True)
    )
    scale = scale_from_amax(
        amax.view(torch.bfloat16).float(),
        form.max,
        power_of_two=True,
        at_overflow=torch.finfo(torch.bfloat16).max,
    )
    return (
        round_to(blocks.float().mul_(scale), form)
        .mul_(scale.reciprocal())
        .bfloat16()
        .view(padded.shape)[:rows, :columns]
    )


def _magnitudes(matrix: torch.Tensor) -> torch.Tensor:
    """Return the bits of abs(matrix) as int16.

    They are ordered as the numbers are, and integers are compared several times faster.
    """
    return matrix.view(torch.int16) & 0x7FFF
