"""The compiled module `transformer_engine_torch`, replaced by plain torch on the CPU.

Names and arguments are those that the Python callers of release 2.11 expect, which import `*`: the
names of `quantized` are public here too. Any other name raises NotImplementedError when called.
`LOG` keeps every quantization, product and scale update, in order; `BOUNDS` what float32 kernels
may return for the latest products.
"""

from __future__ import annotations

import collections
import enum
import zlib
from typing import Any

import torch

from tests.fp8.emulation import arithmetic as A
from tests.fp8.emulation.quantized import (  # noqa: F401 - also attributes of this module
    LOG,
    DType,
    Float8BlockScaleTensorFormat,
    dequantize,
    flatten_tokens,
    quantize,
    quantized_matrix,
    torch_dtype,
)

FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors",
    [f"GEMM{g}_{name}" for g in (1, 2, 3) for name in ("INPUT", "WEIGHT", "OUTPUT")],
    start=0,
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{name}{g}" for g in (1, 2, 3) for name in ("OUTPUT", "INPUT")], start=0
)
CommOverlapType = enum.IntEnum("CommOverlapType", "RS AG", start=0)
CommOverlapAlgo = enum.IntEnum("CommOverlapAlgo", "BULK_OVERLAP_AG BULK_OVERLAP_RS", start=0)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    {
        "NVTE_No_Backend": -1,
        "NVTE_F16_max512_seqlen": 0,
        "NVTE_F16_arbitrary_seqlen": 1,
        "NVTE_FP8": 2,
    },
)


class _Names(type):
    """An enum whose values are never used in arithmetic: any name yields a distinct number."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return zlib.crc32(name.encode()) & 0x7FFF


(
    NVTE_QKV_Layout,
    NVTE_QKV_Format,
    NVTE_Bias_Type,
    NVTE_Mask_Type,
    NVTE_Softmax_Type,
    NVTEScalingMode,
) = (
    _Names(name, (), {})
    for name in (
        "NVTE_QKV_Layout",
        "NVTE_QKV_Format",
        "NVTE_Bias_Type",
        "NVTE_Mask_Type",
        "NVTE_Softmax_Type",
        "NVTEScalingMode",
    )
)
FP8TensorMeta, CommOverlap, CommOverlapP2P, CommOverlapHelper = (
    type(name, (), {})
    for name in ("FP8TensorMeta", "CommOverlap", "CommOverlapP2P", "CommOverlapHelper")
)

BOUNDS: collections.deque[tuple[str, torch.Tensor, torch.Tensor]] = collections.deque(maxlen=64)
"""(name of a result: y, dx or dw; its lowest and its highest value), the latest last."""
ROUNDINGS_OF_SCALES = 3
"""Float32 roundings of a result after its sum: the scales' product, times the sum, the bias."""


def bounds(
    exact: torch.Tensor, magnitudes: torch.Tensor, terms: int, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and the highest value of `kind` that a float32 sum in any order may have.

    `exact` is the sum in float64, `magnitudes` that of its terms' magnitudes; FP8 values multiply
    exactly in float32. n roundings to nearest, u = 2^-24 each, move a sum by at most
    n u / (1 - n u) times the sum of magnitudes (Higham, Accuracy and Stability of Numerical
    Algorithms, 4.2). Rounding to `kind` is monotonic, so it may be applied to both ends.
    """
    error = (terms + ROUNDINGS_OF_SCALES) * 2.0**-24
    error = magnitudes * (error / (1 - error))
    return (exact - error).to(kind), (exact + error).to(kind)


def generic_gemm(
    A_: Any, transpose_a: bool, B: Any, transpose_b: bool, D: torch.Tensor | None, quantizer: Any,
    out_dtype: Any, bias: torch.Tensor | None, bias_type: Any, gelu: bool, gelu_in: Any,
    grad: bool, workspace: Any, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: Any = None,
) -> tuple[Any, torch.Tensor | None, None, None]:  # fmt: skip
    """Return op(B) op(A) of row-major matrices in float64, rounded once to the output's type."""
    assert not gelu and comm_overlap is None and quantizer is None
    LOG.append(
        (
            "gemm",
            type(A_).__name__,
            type(B).__name__,
            bool(transpose_a),
            bool(transpose_b),
            bool(use_split_accumulator),
        )
    )
    # a, b: float64 [rows, columns]; left [m, k] and right [k, n] of the product [m, n]
    a, b = quantized_matrix(A_, not transpose_a).double(), quantized_matrix(B, transpose_b).double()
    left, right = b.t() if transpose_b else b, a.t() if transpose_a else a
    exact, magnitudes = left @ right * alpha, left.abs() @ right.abs() * abs(alpha)
    bias_gradient = None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = b.sum(0).to(bias.dtype)
        else:
            exact, magnitudes = exact + bias.double(), magnitudes + bias.double().abs()
    kind = (
        D.dtype
        if D is not None
        else torch_dtype(out_dtype)
        if out_dtype is not None
        else torch.bfloat16
    )
    BOUNDS.append(
        (
            "dw" if transpose_b else "y" if transpose_a else "dx",
            *bounds(exact, magnitudes, left.shape[1], kind),
        )
    )
    out = exact.to(kind)
    if not transpose_b and hasattr(B, "size"):
        out = out.reshape(*tuple(B.size())[:-1], out.shape[-1])
    if D is not None:
        out = D.add_(out.reshape(D.shape)) if accumulate else D.copy_(out.reshape(D.shape))
    return out, bias_gradient, None, None


def bgrad_quantize(grad: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    """Return (the bias gradient, the quantized gradient)."""
    return flatten_tokens(grad).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


def fp8_transpose(data: torch.Tensor, kind: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the bytes with the last dimension first."""
    turned = (
        data.reshape(-1, data.shape[-1]).t().contiguous().reshape(data.shape[-1:] + data.shape[:-1])
    )
    return turned if out is None else out.copy_(turned)


def fused_amax_and_scale_update_after_reduction(
    reduced: torch.Tensor,
    histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    algo: str,
    kind: Any,
    margin: float,
) -> None:
    """Update the scales and histories of every layer after a pass (delayed scaling)."""
    parts = reduced.split([scale.numel() for scale in scales])
    for part, history, scale in zip(parts, histories, scales, strict=True):
        A.update_history(
            history, scale, part, A.LARGEST[torch_dtype(kind)], margin=margin, algo=algo
        )
    LOG.append(("update", torch_dtype(kind), len(scales)))


def _finish_norm(
    values: torch.Tensor, out: Any, quantizer: Any, kind: Any, shape: torch.Size
) -> Any:
    values = values.to(torch_dtype(kind)).reshape(shape)
    if quantizer is not None:
        return quantizer(values) if out is None else quantize(values, quantizer, out)
    return values if out is None else out.copy_(values.reshape(out.shape))


def layernorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    kind: Any,
    margin: int,
    zero_centered: bool,
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Run LayerNorm in float32, round to the output's type, then quantize."""
    values = flatten_tokens(x).float()
    mean = values.mean(-1)
    inverse = (values.var(-1, unbiased=False) + eps).rsqrt()
    normal = (values - mean[:, None]) * inverse[:, None] * (
        weight.detach().float() + zero_centered
    ) + bias.detach().float()
    return _finish_norm(normal, out, quantizer, kind, x.shape), mean, inverse


def rmsnorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    kind: Any,
    margin: int,
    zero_centered: bool,
) -> tuple[Any, None, torch.Tensor]:
    """Run RMSNorm in float32, round to the output's type, then quantize."""
    values = flatten_tokens(x).float()
    inverse = (values.pow(2).mean(-1) + eps).rsqrt()
    return (
        _finish_norm(
            values * inverse[:, None] * (weight.detach().float() + zero_centered),
            out,
            quantizer,
            kind,
            x.shape,
        ),
        None,
        inverse,
    )


def layernorm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    margin: int,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of LayerNorm's input, weight and bias."""
    dz = flatten_tokens(grad).float()
    normal = (x.reshape(dz.shape).float() - mean[:, None]) * inverse[:, None]
    dy = dz * (weight.float() + zero_centered)
    dx = (dy - dy.mean(-1, keepdim=True) - normal * (dy * normal).mean(-1, keepdim=True)) * inverse[
        :, None
    ]
    return (
        dx.to(x.dtype).reshape(grad.shape),
        (dz * normal).sum(0).to(weight.dtype),
        dz.sum(0).to(weight.dtype),
    )


def rmsnorm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    margin: int,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of RMSNorm's input and weight."""
    dz = flatten_tokens(grad).float()
    normal = x.reshape(dz.shape).float() * inverse[:, None]
    dy = dz * (weight.float() + zero_centered)
    dx = (dy - normal * (dy * normal).mean(-1, keepdim=True)) * inverse[:, None]
    return dx.to(x.dtype).reshape(grad.shape), (dz * normal).sum(0).to(weight.dtype)


def get_cublasLt_version() -> int:
    """Return a release that supports every FP8 product."""
    return 130200


def get_cudnn_version() -> int:
    """Return a release that supports every norm."""
    return 91500


def get_num_cublas_streams() -> int:
    """Return the number on a GPU."""
    return 4


def device_supports_multicast(*arguments: Any) -> bool:
    """Return False: not emulated."""
    return False


def ubuf_built_with_mpi() -> bool:
    """Return False: not emulated."""
    return False


def get_fused_attn_backend(*arguments: Any, **named: Any) -> Any:
    """Return no backend: attention is not emulated."""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend


class _Missing:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self._name} is not emulated")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name)
