"""FP8 casts by torch's float8 types: independent of the package, which never uses them.

Matrices are 2-D; blocks run along rows unless stated otherwise.
"""

from __future__ import annotations

import math

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
FLOAT32_MAX = torch.finfo(torch.float32).max


def cast(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Cast as a GPU does: to nearest, ties to even, saturating at the range's ends; NaN is kept."""
    return values.clamp(-LARGEST[kind], LARGEST[kind]).to(kind)


def scale_from_amax(
    amax: torch.Tensor, largest: float, *, power_of_two: bool, eps: float, at_overflow: float
) -> torch.Tensor:
    """largest / max(amax, eps), the division rounded once; 1 where amax is 0 or not finite."""
    amax = amax.clamp(min=eps)
    scale = torch.full_like(amax, largest) / amax
    scale = torch.where(scale.isinf(), at_overflow, scale)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.full_like(mantissa, 0.5), exponent)
    return torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(scale), scale)


def _two_to(exponent: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)


def cast_micro_blocks(matrix: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast blocks of 32 along a row: (values [r, c], biased exponents uint8 [r, c / 32]).

    Exponents are computed one by one in double precision.
    """
    rows, columns = matrix.shape
    blocks = matrix.float().reshape(rows, columns // 32, 32)
    wanted = blocks.abs().amax(-1) * torch.tensor(1 / LARGEST[kind], dtype=torch.float32)
    # frexp gives wanted = m x 2^e with 1/2 <= m < 1: the next power of two is 2^e, but 2^(e - 1)
    # where m is 1/2 itself.
    mantissa, exponent = torch.frexp(wanted.double())
    biased = (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254)
    biased = torch.where(wanted == 0, 0, biased)
    factor = torch.where(biased == 0, 1.0, _two_to(127 - biased)).float()
    return cast(blocks * factor[..., None], kind).reshape(rows, columns), biased.to(torch.uint8)


def restore_micro_blocks(values: torch.Tensor, biased: torch.Tensor) -> torch.Tensor:
    """Float32 [r, c] of `cast_micro_blocks`."""
    rows, columns = values.shape
    factor = _two_to(biased.int() - 127).float()
    return (values.float().reshape(rows, columns // 32, 32) * factor[..., None]).reshape(
        rows, columns
    )


def cast_blocks(
    matrix: torch.Tensor,
    kind: torch.dtype,
    block: tuple[int, int],
    *,
    power_of_two: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast blocks of height x width.

    Return (values [r, c], float32 factors that scale back [ceil(r / height), ceil(c / width)]).
    """
    (rows, columns), (height, width) = matrix.shape, block
    padded = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % height)).float()
    tiles = padded.reshape(math.ceil(rows / height), height, math.ceil(columns / width), width)
    scale = scale_from_amax(
        tiles.abs().amax((1, 3)),
        LARGEST[kind],
        power_of_two=power_of_two,
        eps=eps,
        at_overflow=torch.finfo(matrix.dtype).max,
    )
    values = cast(tiles * scale[:, None, :, None], kind).reshape(padded.shape)[:rows, :columns]
    return values, scale.reciprocal()


def restore_blocks(
    values: torch.Tensor, back: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """Float32 [r, c] of `cast_blocks`."""
    rows, columns = values.shape
    return (
        values.float()
        * back.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    )


def update_history(
    history: torch.Tensor,
    scale: torch.Tensor,
    reduced: torch.Tensor,
    largest: float,
    *,
    margin: float,
    algo: str,
) -> None:
    """Update windows and scales after a pass (delayed scaling), in place, tensor by tensor.

    A tensor that did not occur keeps its history and scale.
    """
    for column in range(scale.numel()):
        current = float(reduced[column]) or float(history[0, column])
        if current == 0:
            continue
        window = [*history[1:, column].tolist(), current]
        history[:, column] = torch.tensor([0.0, *window[1:]])
        amax = torch.tensor(max(window) if algo == "max" else current)
        if amax.isfinite() and amax > 0:
            scale[column] = (torch.tensor(largest * 2.0**-margin) / amax).clamp(max=FLOAT32_MAX)
