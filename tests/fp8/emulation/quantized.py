"""Quantized tensors of Transformer Engine, cast and read back in plain torch on the CPU.

Layouts of bytes and scales are those that the Python callers of release 2.11 expect.
"""

from __future__ import annotations

import enum
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
Float8BlockScaleTensorFormat = enum.IntEnum(
    "Float8BlockScaleTensorFormat", "GEMM_READY COMPACT", start=0
)

LOG: list[tuple[Any, ...]] = []
"""Every quantization, scale update and product, in order."""
CAPABILITY = [9, 0]
"""Compute capability of the emulated device; `loader.load` sets it."""
_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: A.E4M3,
    DType.kFloat8E5M2: A.E5M2,
}


def torch_dtype(number: int) -> torch.dtype:
    return _TORCH[DType(int(number))]


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def flatten_tokens(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _transposes_in_products() -> bool:
    """Blackwell multiplies FP8 matrices in every layout; Hopper needs a transposed copy."""
    return CAPABILITY[0] == 10


def quantize(
    tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None
) -> Any:
    """Quantize `tensor` as `quantizer` describes, into `output` if given."""
    name = type(quantizer).__name__
    LOG.append(
        (
            "quantize",
            name,
            torch_dtype(quantizer.dtype),
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
    }[name](flatten_tokens(tensor), tuple(tensor.shape), quantizer)
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

    tensor_class, storage_class, extra = {
        "MXFP8Quantizer": (mxfp8_tensor.MXFP8Tensor, mxfp8_tensor_storage.MXFP8TensorStorage, {}),
        "Float8BlockQuantizer": (
            float8_blockwise_tensor.Float8BlockwiseQTensor,
            float8_blockwise_tensor_storage.Float8BlockwiseQTensorStorage,
            {"is_2D_scaled": getattr(quantizer, "block_scaling_dim", 0) == 2},
        ),
    }.get(name, (float8_tensor.Float8Tensor, float8_tensor_storage.Float8TensorStorage, {}))
    if "scale_inv" in fields:
        # the constructor's names for what the tensor calls _scale_inv and _transpose
        fields = {
            "fp8_scale_inv": fields["scale_inv"],
            "data": fields["data"],
            "data_transpose": fields["transpose"],
        }
    arguments = fields | extra | {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    return (
        storage_class(**arguments)
        if quantizer.internal
        else tensor_class(shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, **arguments)
    )


def _per_tensor(
    values: torch.Tensor, scale: torch.Tensor, shape: tuple[int, ...], quantizer: Any
) -> dict[str, Any]:
    data = _bytes(A.cast(values.float() * scale, torch_dtype(quantizer.dtype)))
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
        A.LARGEST[torch_dtype(quantizer.dtype)],
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
        data, scales = A.cast_micro_blocks(values, torch_dtype(quantizer.dtype))
        fields["rowwise_data"] = _bytes(data).reshape(shape)
        fields["rowwise_scale_inv"] = _padded(
            scales, (_up(scales.shape[0], 128), _up(scales.shape[1], 4))
        )
    if quantizer.columnwise_usage:
        data, scales = A.cast_micro_blocks(values.t(), torch_dtype(quantizer.dtype))
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
        data, scales = A.cast_blocks(values, torch_dtype(quantizer.dtype), block, **how)
        scales = scales if square or compact else scales.t()
        fields["rowwise_data"] = _bytes(data).reshape(shape)
        fields["rowwise_scale_inv"] = _padded(
            scales, quantizer.get_scale_shape(shape, columnwise=False)
        )
    if quantizer.columnwise_usage:
        data, scales = A.cast_blocks(values.t(), torch_dtype(quantizer.dtype), block, **how)
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


def quantized_matrix(tensor: Any, columnwise: bool) -> torch.Tensor:
    """Return an operand as float32 [r, c]; `columnwise` selects the copy quantized down columns."""
    name = type(tensor).__name__
    if not name.startswith(("Float8", "MXFP8")):
        return tensor.detach().reshape(-1, tensor.shape[-1]).float()
    kind = torch_dtype(tensor._fp8_dtype)
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
    """Return the values of a quantized tensor."""
    return quantized_matrix(tensor, False).to(torch_dtype(kind)).reshape(tensor.size())
