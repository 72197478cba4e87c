"""Transformer Engine: whether it can run here, and which recipes the device has.

The one file that imports it.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_chatflow.distributed import cuda_shim

OLDEST, NEWEST = (2, 9), (2, 11)
"""The releases that megatron-core 0.16.1 is made for, and whose arithmetic the reference was held
against.
"""


def transformer_engine_reason() -> str | None:
    """Why Transformer Engine layers cannot run here, or None where they can."""
    if cuda_shim.is_needed():
        return "there is no CUDA device"
    try:
        # An optional package.
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    # a package without its compiled part raises RuntimeError, a missing library OSError
    except Exception as error:
        return f"transformer_engine does not import ({error})"
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        return "megatron-core found no Transformer Engine it can use, though it imports"
    return version_reason(importlib.metadata.version("transformer_engine"))


def version_reason(version: str) -> str | None:
    """Why this release of Transformer Engine is not used, or None."""
    major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
    if OLDEST <= (major, minor) <= NEWEST:
        return None
    return f"Transformer Engine is {version}, and megatron-core 0.16.1 works with 2.9 to 2.11"


def device_reason(recipe: str, capability: tuple[int, int], cuda: str) -> str | None:
    """Return why a device of this compute capability and CUDA release cannot run a recipe, or None.

    The rules are Transformer Engine 2.11's.
    """
    here = f"this device has compute capability {capability[0]}.{capability[1]}"
    if recipe == "mxfp8":
        if capability >= (12, 0):
            return f"mxfp8 does not run on compute capability 12.0 and above, and {here}"
        return (
            None
            if capability >= (10, 0)
            else f"mxfp8 needs compute capability 10.0 (Blackwell), and {here}"
        )
    if recipe == "blockwise":
        if capability < (9, 0):
            return f"blockwise needs compute capability 9.0 (Hopper), and {here}"
        return (
            None
            if tuple(map(int, cuda.split(".")[:2])) >= (12, 9)
            else f"blockwise needs CUDA 12.9, and torch was built with {cuda}"
        )
    return (
        None
        if capability >= (8, 9)
        else f"FP8 needs compute capability 8.9 (Ada, Hopper), and {here}"
    )


def forget_validation(decoder: TransformerBlock) -> None:
    """Keep passes without gradients out of delayed scaling's histories.

    Transformer Engine notes the magnitudes of every pass and uses them at the next update, so
    validation would move the scales of training, and a resumed run that validates at other
    iterations would have other bits. The row of the running pass is empty between iterations.
    """

    def clear(module: TransformerBlock, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            return
        for layer in module.modules():
            state = getattr(layer, "fp8_meta", {}).get("scaling_fwd")
            if state is not None:
                state.amax_history[0].zero_()

    decoder.register_forward_hook(clear)
