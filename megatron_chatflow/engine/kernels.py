"""CUDA kernels outside torch that are used where they are: which are there, and why not."""

from __future__ import annotations

import importlib


def gradient_accumulation_reason() -> str | None:
    """Why weight gradients are not added to the float32 buffer inside the product that makes them, or None where they are.

    The kernel is apex's `fused_weight_gradient_mlp_cuda`. Its own module is tried and never `apex`: the package of that name on PyPI is another one.
    """
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except Exception as error:  # an extension built for another torch raises whatever its loader does
        return f"fused_weight_gradient_mlp_cuda does not import ({error})"
    return None
