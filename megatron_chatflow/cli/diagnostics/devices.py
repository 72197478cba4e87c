"""Devices, collectives and layers.

torch is imported only where there may be a GPU, or on request; elsewhere the answer is known.
"""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
import time
from pathlib import Path
from typing import Any

from megatron_chatflow.cli.diagnostics import Row
from megatron_chatflow.distributed.kernels import (
    describe_cpu,
    gradient_accumulation_reason,
    has_bf16_units,
)

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def no_cuda_reason() -> str | None:
    """Return why there can be no CUDA device; None where only torch can find out."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is missing"
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    if build.get("cuda") is None:
        return f"torch {build['__version__']} was built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    return None


def devices(*, full: bool) -> list[Row]:
    """Return the rows of devices, collectives, layers and the extension that apex builds."""
    reason = no_cuda_reason()
    if reason is None or full:
        return _asked_of_torch()
    return [
        Row("device", "cpu", reason),
        _cpu(has_bf16_units()),
        Row("collectives", "gloo", "nccl needs CUDA"),
        Row("layers", "portable", f"{reason}; FP8 is the reference in plain torch, for rehearsal"),
        _fused_weight_gradients(),
        Row(
            "imports",
            "not tried",
            "`chatflow doctor --full` imports torch and megatron-core and connects the processes",
        ),
    ]


def _asked_of_torch() -> list[Row]:
    begin = time.perf_counter()
    try:
        import torch
    # A library that is missing or does not match raises OSError or RuntimeError.
    except Exception as error:
        return [Row("torch", "does not import", str(error), wrong=True)]
    there = torch.cuda.is_available()
    rows = [
        Row(
            "device",
            "cuda" if there else "cpu",
            "" if there else no_cuda_reason() or "torch.cuda.is_available() is False",
        )
    ]
    for i in range(torch.cuda.device_count() if there else 0):
        of = torch.cuda.get_device_properties(i)
        rows.append(
            Row(
                f"  GPU {i}",
                of.name,
                f"{of.total_memory / 2**30:.1f} GiB, compute capability {of.major}.{of.minor}",
            )
        )
    if not there:
        from megatron_chatflow.distributed.bf16_matmul import is_float32_faster

        rows.append(_cpu(not is_float32_faster()))
    backends = {
        "nccl": torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_gloo_available(),
    }
    used, names = (
        "nccl" if there else "gloo",
        ", ".join(name for name, ok in backends.items() if ok),
    )
    rows.append(
        Row("collectives", names, f"{used} is used on this device", wrong=not backends[used])
    )
    rows += _layers(torch, there)
    return [
        *rows,
        _fused_weight_gradients(),
        Row("imports", "tried", f"{time.perf_counter() - begin:.1f} s"),
    ]


def _layers(torch: Any, there: bool) -> list[Row]:
    from megatron_chatflow.distributed import cuda_shim, process_groups

    process_groups.hide_engine_warnings()
    cuda_shim.install()
    try:
        from megatron_chatflow.fp8.transformer_engine import (
            device_reason,
            transformer_engine_reason,
        )
    except ImportError as error:
        return [Row("megatron-core", "does not import", str(error), wrong=True)]
    reason = transformer_engine_reason()
    if not there:
        return [
            Row(
                "layers",
                "portable",
                f"{reason}; FP8 is the reference in plain torch, for rehearsal",
            )
        ]
    if reason:
        return [Row("layers", "portable", f"{reason}; no FP8")]
    rows = [Row("layers", "transformer_engine", "CUDA and Transformer Engine are available")]
    capability, cuda = torch.cuda.get_device_capability(), torch.version.cuda
    for recipe in RECIPES:
        why = device_reason(recipe, capability, cuda)
        rows.append(Row(f"  {recipe}", "no" if why else "yes", why or ""))
    return rows


def _cpu(units: bool | None) -> Row:
    """Return what the CPU supports, and how it computes bfloat16 products."""
    found, _, way = describe_cpu(None if units is None else not units).partition("; ")
    return Row("  features", found, way)


def _fused_weight_gradients() -> Row:
    """Return the row of the extension with which megatron-core adds weight gradients in place.

    Transformer Engine's layers do this without it.
    """
    reason = gradient_accumulation_reason()
    return Row(
        "gradient fusion", "no" if reason else "on CUDA", reason or "fused_weight_gradient_mlp_cuda"
    )
