"""Matrix products of bfloat16 on a CPU, by its bfloat16 units or, where it has none, in float32.

Without such units (AMX or AVX512-BF16 on x86) a bfloat16 product is emulated, 3 to 40 times slower
than a float32 one. Products of bfloat16 numbers are exact in float32 and are added up in float32 in
either way, so both have the same result up to the order of addition. The way is a property of the
CPU, not of a run: it is found once in a process, and all ranks take the same one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_chatflow.distributed.kernels import has_bf16_units

BLOCK = 1 << 20
"""Elements that are in float32 at a time of what is worked on in blocks: they fit the CPU's
cache.
"""
FEW_ROWS = 2
"""So few rows are bound by reading the weight, which is half as long in bfloat16."""

_agreed: bool | None = None
"""What all ranks of the present job do; None before they have agreed."""


@functools.cache
def is_float32_faster() -> bool:
    """Return whether this process multiplies bfloat16 faster in float32.

    The CPU's features determine that where they can, else a measurement.
    """
    units = has_bf16_units()
    return _is_float32_faster_by_the_clock() if units is None else not units


def _is_float32_faster_by_the_clock() -> bool:
    """Return whether float32 is faster by a measurement.

    Units take a quarter to a half of float32's time, an emulation three times as long or more; no
    CPU is near the limit between.
    """
    a, b = torch.ones(256, 512), torch.ones(512, 512)
    best = []
    for x, y in ((a, b), (a.bfloat16(), b.bfloat16())):
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            torch.matmul(x, y)
            times.append(time.perf_counter() - begin)
        best.append(min(times))
    return best[1] > 1.2 * best[0]


def agree() -> None:
    """Take the float32 way on all ranks where one of them needs it.

    Called by all, after the process groups are made.
    """
    global _agreed
    needs = torch.tensor([is_float32_faster()], dtype=torch.int32)
    dist.all_reduce(needs, dist.ReduceOp.MAX)
    _agreed = bool(needs)


def uses_float32(*operands: torch.Tensor) -> bool:
    """Return whether products of these operands are made in float32: bfloat16 on such a CPU.

    Without operands: whether this job does so.
    """
    if not all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in operands):
        return False
    return is_float32_faster() if _agreed is None else _agreed


def mm_in_float32(
    a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return scale x a b + bias [m, n] of bfloat16 a [m, k] and b [k, n], rounded once.

    The longest of the three dimensions is worked on in blocks.
    """
    (m, k), n = a.shape, b.shape[1]
    if m <= FEW_ROWS and b.t().is_contiguous() and scale == 1.0 and bias is None:
        return torch.mm(a, b)
    out = a.new_empty(m, n)

    def finish(rows: slice, columns: slice, sums: torch.Tensor) -> None:
        if scale != 1.0:
            sums.mul_(scale)
        if bias is not None:
            sums.add_(bias[columns])
        out[rows, columns] = sums

    everything = slice(None)
    if n >= max(m, k):
        a = a.float()
        for block in _blocks(n, max(m, k)):
            finish(everything, block, torch.mm(a, b[:, block].float()))
    elif m >= k:
        b = b.float()
        for block in _blocks(m, max(k, n)):
            finish(block, everything, torch.mm(a[block].float(), b))
    else:
        sums = torch.zeros(m, n)
        for block in _blocks(k, max(m, n)):
            sums.addmm_(a[:, block].float(), b[block].float())
        finish(everything, everything, sums)
    return out


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b [g, m, n] of a [g, m, k] and b [g, k, n]."""
    return torch.bmm(a.float(), b.float()).bfloat16() if uses_float32(a, b) else torch.bmm(a, b)


def _blocks(length: int, other: int) -> Iterator[slice]:
    step = max(1, BLOCK // other)
    return (slice(start, start + step) for start in range(0, length, step))
