"""The two FP8 formats and the exact arithmetic of their scales, as pure functions of tensors.

Sources: OCP 8-bit Floating Point Specification (E4M3, E5M2); OCP Microscaling Formats (E8M0); the
semantics of Transformer Engine's cast and scale kernels, release 2.11, as their results are defined
(docs/fp8.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOAT32_MAX = torch.finfo(torch.float32).max
_EXPONENT = 0x7F800000
_MANTISSA = 0x007FFFFF


@dataclass(frozen=True)
class Format:
    """An FP8 format: sign, exponent and `mantissa` bits."""

    name: str
    mantissa: int
    """Stored bits of the mantissa."""
    smallest_exponent: int
    """Exponent of the smallest normal number; below it the grid is even."""
    max: float
    """Largest finite value."""


E4M3 = Format("e4m3", 3, -6, 448.0)
E5M2 = Format("e5m2", 2, -14, 57344.0)


def round_to(values: torch.Tensor, form: Format) -> torch.Tensor:
    """Round `values` (float32, overwritten) to the nearest value of `form`, ties to even.

    Values beyond the largest one become the largest; NaN stays NaN.

    This is the saturating cast of a GPU, but for the sign of a zero. Adding and taking away 1.5 x
    2^(23 + e - m), where 2^(e - m) is the distance of two neighbours on the grid near the value,
    lets the float32 addition do the rounding: its last bit is then that distance.
    """
    values.clamp_(-form.max, form.max)
    shift = values.view(torch.int32) & _EXPONENT
    shift.clamp_(min=(form.smallest_exponent + 127) << 23).add_(
        ((23 - form.mantissa) << 23) | (1 << 22)
    )
    magic = shift.view(torch.float32)
    return values.add_(magic).sub_(magic)


def absolute_max(tensor: torch.Tensor) -> torch.Tensor:
    """Largest magnitude as a float32 scalar tensor; NaNs do not count, as on a GPU."""
    low, high = tensor.aminmax()
    amax = torch.maximum(high, -low).float()
    if torch.isnan(amax):
        seen = tensor[~tensor.isnan()]
        return seen.abs().max().float() if seen.numel() else amax.new_zeros(())
    return amax


def scale_from_amax(
    amax: torch.Tensor,
    largest: float,
    *,
    power_of_two: bool = False,
    at_overflow: float = FLOAT32_MAX,
) -> torch.Tensor:
    """Return the factor that takes magnitudes up to `amax` onto a format's range.

    It is largest / amax, or 1 where amax is 0 or not finite.

    Args:
        amax: float32, any shape.
        largest: largest value of the format.
        power_of_two: round down to a power of two.
        at_overflow: the factor where the quotient overflows.
    """
    # A scalar over a tensor would be multiplied by a rounded reciprocal; a GPU divides.
    scale = torch.div(torch.full_like(amax, largest), amax)
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, at_overflow), scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT).view(torch.float32)
    return torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(scale), scale)


def power_of_two_above(values: torch.Tensor) -> torch.Tensor:
    """Return biased exponents e (int32, 0 to 255) with 2^(e - 127) >= values.

    float32 to E8M0, rounded up; 255 is NaN, infinity becomes 254.
    """
    bits = values.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & _MANTISSA
    up = (mantissa > 0) & (exponent < 254) & ~((exponent == 0) & (mantissa <= 1 << 22))
    exponent = exponent + up.int()
    exponent = torch.where(torch.isinf(values), torch.full_like(exponent, 254), exponent)
    return torch.where(torch.isnan(values), torch.full_like(exponent, 255), exponent)


def exponent_factors(exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (factor to scale by, factor to scale back by), float32, of biased exponents.

    They are 2^(127 - e) and 2^(e - 127).

    Transformer Engine 2.11 scales a block whose exponent is 0 by 1: only blocks below 2.6e-36,
    whose values all become 0.
    """
    down = ((254 - exponent) << 23).view(torch.float32)
    down = torch.where(exponent >= 254, torch.where(exponent == 254, 2.0**-127, torch.nan), down)
    up = torch.where(exponent == 0, 2.0**-127, (exponent << 23).view(torch.float32))
    return torch.where(exponent == 0, 1.0, down), torch.where(exponent == 255, torch.nan, up)
