"""What determines which kernels run: CUDA kernels outside torch, and the units of a CPU.

Imports no torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
from pathlib import Path

BF16_UNITS = ("amx_bf16", "avx512_bf16")
FEATURES = ("avx2", "avx512f", *BF16_UNITS)
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables that keep torch's kernels from units that the CPU has."""


def gradient_accumulation_reason() -> str | None:
    """Return why weight gradients are not accumulated inside the product that makes them, or None.

    The kernel is apex's `fused_weight_gradient_mlp_cuda`. Its own module is tried and never `apex`:
    the package of that name on PyPI is another one.
    """
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except (
        Exception
    ) as error:  # an extension built for another torch raises whatever its loader does
        return f"fused_weight_gradient_mlp_cuda does not import ({error})"
    return None


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Which of `FEATURES` the CPU has, by Linux' names; none where Linux names none of them."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    return tuple(name for name in FEATURES if name in flags)


def has_bf16_units() -> bool | None:
    """Return whether torch multiplies bfloat16 by units of this CPU; None if only measurable."""
    if platform.machine() != "x86_64" or not cpu_features():
        return None
    if not set(BF16_UNITS) & set(cpu_features()):
        return False
    return None if any(name in os.environ for name in LIMITS) else True


def describe_cpu(in_float32: bool | None) -> str:
    """Describe the CPU's features and how bfloat16 products are made on it.

    None: only a measurement can show how.
    """
    way = {
        None: "whether bf16 products are made in float32 is measured at the start of a run",
        True: "no bf16 units: bf16 products in float32",
        False: "bf16 units",
    }[in_float32]
    return f"{', '.join(cpu_features()) or platform.machine()}; {way}"
