"""Stands for the compiled module `transformer_engine_torch`: what Transformer Engine's Python
calls, in plain torch on the CPU.

Names, arguments and layouts are those that the Python callers of release 2.11 expect. What is not
here raises NotImplementedError by its name. `LOG` keeps every quantisation, product and scale
update, in order; `BOUNDS` what float32 kernels may return for the latest products.
"""

from __future__ import annotations

import collections
import enum
import zlib
from typing import Any

import torch

from tests.fp8.emulation import arithmetic as A

DType = enum.IntEnum(
    "DType",
    (
        "kByte kInt16 kInt32 kInt64 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 "
        "kFloat8E8M0 kFloat4E2M1"
    ),
    start=0,
)
FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors",
    [f"GEMM{g}_{name}" for g in (1, 2, 3) for name in ("INPUT", "WEIGHT", "OUTPUT")],
    start=0,
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{name}{g}" for g in (1, 2, 3) for name in ("OUTPUT", "INPUT")], start=0
)
Float8BlockScaleTensorFormat = enum.IntEnum(
    "Float8BlockScaleTensorFormat", "GEMM_READY COMPACT", start=0
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
    """An enum whose members are never computed with: each name is a number of its own."""

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

LOG: list[tuple[Any, ...]] = []
BOUNDS: collections.deque[tuple[str, torch.Tensor, torch.Tensor]] = collections.deque(maxlen=64)
"""(name of a result: y, dx or dw; its lowest and its highest value), the latest last."""
ROUNDINGS_OF_SCALES = 3
"""Float32 roundings of a result besides its sum's: the product of two scales, the sum times that,
the bias added.
"""
CAPABILITY = [9, 0]
_TORCH = {
    DType.kByte: torch.uint8, DType.kInt32: torch.int32, DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16, DType.kFloat8E4M3: A.E4M3, DType.kFloat8E5M2: A.E5M2,
}  # fmt: skip


def _kind(number: int) -> torch.dtype:
    return _TORCH[DType(int(number))]


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def bounds(
    exact: torch.Tensor, magnitudes: torch.Tensor, terms: int, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest value of `kind` that a float32 sum may be rounded to, in any
    order.

    `exact` is the sum in float64, `magnitudes` that of its terms' magnitudes; FP8 values multiply
    exactly in float32. n roundings to nearest, u = 2^-24 each, move a sum by at most
    n u / (1 - n u) times the sum of magnitudes (Higham, Accuracy and Stability of Numerical
    Algorithms, 4.2). Rounding to `kind` is monotonic, so it may be applied to both ends.
    """
    error = (terms + ROUNDINGS_OF_SCALES) * 2.0**-24
    error = magnitudes * (error / (1 - error))
    return (exact - error).to(kind), (exact + error).to(kind)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _transposes_in_products() -> bool:
    """Blackwell multiplies FP8 matrices in every layout; Hopper needs a transposed copy of the
    bytes.
    """
    return CAPABILITY[0] == 10


def quantize(
    tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None
) -> Any:
    """`tensor` as the quantised tensor that `quantizer` describes, written into `output` where one
    is given.
    """
    name = type(quantizer).__name__
    LOG.append(
        (
            "quantize",
            name,
            _kind(quantizer.dtype),
            tuple(tensor.shape),
            quantizer.rowwise_usage,
            quantizer.columnwise_usage,
        )
    )
    fields = {
        "Float8Quantizer": _delayed,
        "Float8CurrentScalingQuantizer": _current,
        "MXFP8Quantizer": _micro_blocks,
        "Float8BlockQuantizer": _blocks,
    }[name](_flat(tensor), tuple(tensor.shape), quantizer)
    if output is not None:
        for field, value in fields.items():
            setattr(output, "_" + field, value)
        if name.startswith("Float8Q") or name.startswith("Float8C"):
            output._transpose_invalid = output._transpose is None
        return output
    return _make(tensor, quantizer, name, fields)


def _make(tensor: torch.Tensor, quantizer: Any, name: str, fields: dict[str, Any]) -> Any:
    from transformer_engine.pytorch.tensor import (
        float8_blockwise_tensor,
        float8_tensor,
        mxfp8_tensor,
    )
    from transformer_engine.pytorch.tensor.storage import (
        float8_blockwise_tensor_storage,
        float8_tensor_storage,
        mxfp8_tensor_storage,
    )

    whole, storage, extra = {
        "MXFP8Quantizer": (mxfp8_tensor.MXFP8Tensor, mxfp8_tensor_storage.MXFP8TensorStorage, {}),
        "Float8BlockQuantizer": (
            float8_blockwise_tensor.Float8BlockwiseQTensor,
            float8_blockwise_tensor_storage.Float8BlockwiseQTensorStorage,
            {"is_2D_scaled": getattr(quantizer, "block_scaling_dim", 0) == 2},
        ),
    }.get(name, (float8_tensor.Float8Tensor, float8_tensor_storage.Float8TensorStorage, {}))
    if (
        "scale_inv" in fields
    ):  # the constructor's names for what the tensor calls _scale_inv and _transpose
        fields = {
            "fp8_scale_inv": fields["scale_inv"],
            "data": fields["data"],
            "data_transpose": fields["transpose"],
        }
    arguments = fields | extra | {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    return (
        storage(**arguments)
        if quantizer.internal
        else whole(shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, **arguments)
    )


def _per_tensor(
    values: torch.Tensor, scale: torch.Tensor, shape: tuple[int, ...], quantizer: Any
) -> dict[str, Any]:
    data = _bytes(A.cast(values.float() * scale, _kind(quantizer.dtype)))
    transposed = quantizer.columnwise_usage and not _transposes_in_products()
    return {
        "data": data.reshape(shape)
        if quantizer.rowwise_usage or _transposes_in_products()
        else None,
        "transpose": data.t().contiguous().reshape(shape[-1:] + shape[:-1]) if transposed else None,
        "scale_inv": scale.reciprocal().reshape(1),
    }


def _delayed(values: torch.Tensor, shape: tuple[int, ...], quantizer: Any) -> dict[str, Any]:
    quantizer.amax.copy_(torch.maximum(quantizer.amax, values.float().abs().max()))
    return _per_tensor(values, quantizer.scale.reshape(()), shape, quantizer)


def _current(values: torch.Tensor, shape: tuple[int, ...], quantizer: Any) -> dict[str, Any]:
    amax = values.float().abs().max().reshape(1)
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(
            amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
        )
        LOG.append(("reduce_amax", tuple(shape)))
    scale = A.scale_from_amax(
        amax[0],
        A.LARGEST[_kind(quantizer.dtype)],
        power_of_two=quantizer.force_pow_2_scales,
        eps=quantizer.amax_epsilon,
        at_overflow=A.FLOAT32_MAX,
    )
    return _per_tensor(values, scale, shape, quantizer)


def _padded(scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    full = scales.new_zeros(shape)
    full[: scales.shape[0], : scales.shape[1]] = scales
    return full


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _micro_blocks(values: torch.Tensor, shape: tuple[int, ...], quantizer: Any) -> dict[str, Any]:
    fields: dict[str, Any] = dict.fromkeys(
        ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    )
    if quantizer.rowwise_usage:
        data, scales = A.cast_micro_blocks(values, _kind(quantizer.dtype))
        fields["rowwise_data"] = _bytes(data).reshape(shape)
        fields["rowwise_scale_inv"] = _padded(
            scales, (_up(scales.shape[0], 128), _up(scales.shape[1], 4))
        )
    if quantizer.columnwise_usage:
        data, scales = A.cast_micro_blocks(values.t(), _kind(quantizer.dtype))
        fields["columnwise_data"] = _bytes(data.t()).reshape(shape)
        fields["columnwise_scale_inv"] = _padded(
            scales.t(), (_up(scales.shape[1], 4), _up(scales.shape[0], 128))
        )
    return fields


def _blocks(values: torch.Tensor, shape: tuple[int, ...], quantizer: Any) -> dict[str, Any]:
    how = {"power_of_two": quantizer.force_pow_2_scales, "eps": quantizer.amax_epsilon}
    square, compact = quantizer.block_scaling_dim == 2, quantizer.all_gather_usage
    block = (128, 128) if square else (1, 128)
    fields: dict[str, Any] = dict.fromkeys(
        ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    )
    if quantizer.rowwise_usage:
        data, scales = A.cast_blocks(values, _kind(quantizer.dtype), block, **how)
        scales = scales if square or compact else scales.t()
        fields["rowwise_data"] = _bytes(data).reshape(shape)
        fields["rowwise_scale_inv"] = _padded(
            scales, quantizer.get_scale_shape(shape, columnwise=False)
        )
    if quantizer.columnwise_usage:
        data, scales = A.cast_blocks(values.t(), _kind(quantizer.dtype), block, **how)
        data, scales = (
            data.t() if compact and not square else data,
            scales if square else scales.t(),
        )
        fields["columnwise_data"] = _bytes(data).reshape(quantizer.get_columnwise_shape(shape))
        fields["columnwise_scale_inv"] = _padded(
            scales, quantizer.get_scale_shape(shape, columnwise=True)
        )
    compact = (
        Float8BlockScaleTensorFormat.COMPACT if compact else Float8BlockScaleTensorFormat.GEMM_READY
    )
    return fields | {"data_format": compact}


def _matrix(tensor: Any, columnwise: bool) -> torch.Tensor:
    """Float32 [r, c] of an operand; `columnwise` takes what was quantised along the rows'
    direction, and fails where it was not made.
    """
    name = type(tensor).__name__
    if not name.startswith(("Float8", "MXFP8")):
        return tensor.detach().reshape(-1, tensor.shape[-1]).float()
    kind = _kind(tensor._fp8_dtype)
    if name.startswith(("Float8Blockwise", "MXFP8")):
        data = tensor._columnwise_data if columnwise else tensor._rowwise_data
        scales = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
        assert data is not None, (
            f"{'columnwise' if columnwise else 'rowwise'} data of {name} were not made"
        )
        if name.startswith("MXFP8"):
            values = data.reshape(-1, data.shape[-1]).view(kind)
            rows, columns = values.shape
            if columnwise:
                return A.restore_micro_blocks(values.t(), scales[: rows // 32, :columns].t()).t()
            return A.restore_micro_blocks(values, scales[:rows, : columns // 32])
        assert tensor._data_format == Float8BlockScaleTensorFormat.GEMM_READY, (
            "a product of a tensor in the layout of all-gathers"
        )
        values = (
            data.reshape(data.shape[0], -1) if columnwise else data.reshape(-1, data.shape[-1])
        ).view(kind)
        if tensor._is_2D_scaled:
            restored = A.restore_blocks(values, scales, (128, 128))
        else:
            restored = A.restore_blocks(values, scales.t()[: len(values)], (1, 128))
        return restored.t() if columnwise else restored
    if columnwise and not _transposes_in_products():
        assert tensor._transpose is not None, "the transposed bytes were not made"
        return (
            tensor._transpose.reshape(tensor._transpose.shape[0], -1).view(kind).float()
            * tensor._scale_inv
        ).t()
    assert tensor._data is not None, "the bytes were not made"
    return tensor._data.reshape(-1, tensor._data.shape[-1]).view(kind).float() * tensor._scale_inv


def dequantize(tensor: Any, kind: int) -> torch.Tensor:
    """The values of a quantised tensor."""
    return _matrix(tensor, False).to(_kind(kind)).reshape(tensor.size())


def generic_gemm(
    A_: Any, transpose_a: bool, B: Any, transpose_b: bool, D: torch.Tensor | None, quantizer: Any, out_dtype: Any, bias: torch.Tensor | None,
    bias_type: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int, accumulate: bool, use_split_accumulator: bool,
    comm_overlap: Any = None, comm_type: Any = None, extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: Any = None,
) -> tuple[Any, torch.Tensor | None, None, None]:  # fmt: skip
    """op(B) op(A) of row-major matrices, exact up to its one rounding, whatever this machine's
    order of addition is.
    """
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
    a, b = _matrix(A_, not transpose_a).double(), _matrix(B, transpose_b).double()
    left, right = b.t() if transpose_b else b, a.t() if transpose_a else a
    exact, magnitudes = left @ right * alpha, left.abs() @ right.abs() * abs(alpha)
    bias_gradient = None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = b.sum(0).to(bias.dtype)
        else:
            exact, magnitudes = exact + bias.double(), magnitudes + bias.double().abs()
    kind = (
        D.dtype if D is not None else _kind(out_dtype) if out_dtype is not None else torch.bfloat16
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
    """(the bias's gradient, the quantised gradient)."""
    return _flat(grad).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


def fp8_transpose(data: torch.Tensor, kind: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes with the last dimension first."""
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
    """Delayed scaling after a pass, for every layer."""
    parts = reduced.split([scale.numel() for scale in scales])
    for part, history, scale in zip(parts, histories, scales, strict=True):
        A.update_history(history, scale, part, A.LARGEST[_kind(kind)], margin=margin, algo=algo)
    LOG.append(("update", _kind(kind), len(scales)))


def _finish_norm(
    values: torch.Tensor, out: Any, quantizer: Any, kind: Any, shape: torch.Size
) -> Any:
    values = values.to(_kind(kind)).reshape(shape)
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
    """LayerNorm in float32, rounded to the output's type, then quantised."""
    values = _flat(x).float()
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
    """RMSNorm in float32, rounded to the output's type, then quantised."""
    values = _flat(x).float()
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
    """Gradients of LayerNorm's input, weight and bias."""
    dz = _flat(grad).float()
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
    """Gradients of RMSNorm's input and weight."""
    dz = _flat(grad).float()
    normal = x.reshape(dz.shape).float() * inverse[:, None]
    dy = dz * (weight.float() + zero_centered)
    dx = (dy - normal * (dy * normal).mean(-1, keepdim=True)) * inverse[:, None]
    return dx.to(x.dtype).reshape(grad.shape), (dz * normal).sum(0).to(weight.dtype)


def get_cublasLt_version() -> int:
    """A release that has every FP8 product."""
    return 130200


def get_cudnn_version() -> int:
    """A release that has every norm."""
    return 91500


def get_num_cublas_streams() -> int:
    """As on a GPU."""
    return 4


def device_supports_multicast(*arguments: Any) -> bool:
    """Not here."""
    return False


def ubuf_built_with_mpi() -> bool:
    """Not here."""
    return False


def get_fused_attn_backend(*arguments: Any, **named: Any) -> Any:
    """None: attention is not emulated."""
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
