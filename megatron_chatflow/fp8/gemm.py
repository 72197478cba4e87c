"""The three products of a linear layer in each recipe: y = x w^T, dx = g w, dw = g^T x.

Operands are 2-D bfloat16 matrices with tokens along the rows.

Which operand is quantised along which dimension is Transformer Engine's: blocks lie along the
dimension that the product sums over, so inputs, weights and gradients are quantised twice by mxfp8
and, but for weights, by blockwise, both times from the bfloat16 tensor.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_chatflow.distributed import bf16_matmul
from megatron_chatflow.fp8.delayed_scaling import (
    BACKWARD_SLOTS,
    BACKWARD_WIDTH,
    FORWARD_SLOTS,
    FORWARD_WIDTH,
    DelayedScaling,
)
from megatron_chatflow.fp8.formats import Format
from megatron_chatflow.fp8.quantize import (
    BLOCK,
    Scaled,
    by_blocks,
    by_micro_blocks,
    with_current_scale,
)

Tensors = tuple[torch.Tensor, ...]


class Products(Protocol):
    """One recipe's products.

    A weight is quantized separately, because it serves all micro-batches of an iteration.
    """

    def weight(self, weight: torch.Tensor, *, training: bool) -> Tensors:
        """[out, in] -> what `forward` and `backward` take as the weight."""
        ...

    def forward(
        self, x: torch.Tensor, weight: Tensors, bias: torch.Tensor | None, *, training: bool
    ) -> tuple[torch.Tensor, Tensors]:
        """[tokens, in] -> (y [tokens, out], what `backward` needs of x).

        The latter is empty unless training.
        """
        ...

    def backward(
        self, grad: torch.Tensor, saved: Tensors, weight: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, out] -> (dx [tokens, in], dw [out, in])."""
        ...


def product(
    a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return scale x a b + bias in bfloat16: scaled and added to in float32, then rounded once."""
    if bf16_matmul.uses_float32(a, b):
        return bf16_matmul.mm_in_float32(a, b, scale, bias)
    if bias is None:
        return torch.addmm(a.new_zeros(b.shape[1]), a, b, beta=0, alpha=scale)
    return torch.addmm(bias, a, b, alpha=scale)


class _PerTensor:
    """One scale a tensor: the FP8 values meet in the product, and the scales after it."""

    def _quantize(self, name: str, matrix: torch.Tensor, training: bool) -> Scaled:
        raise NotImplementedError

    def weight(self, weight: torch.Tensor, *, training: bool) -> Tensors:
        return self._quantize("weight", weight, training)

    def forward(
        self, x: torch.Tensor, weight: Tensors, bias: torch.Tensor | None, *, training: bool
    ) -> tuple[torch.Tensor, Tensors]:
        values, back = self._quantize("input", x, training)
        return product(values, weight[0].t(), (back * weight[1]).item(), bias), (
            values,
            back,
        ) if training else ()

    def backward(
        self, grad: torch.Tensor, saved: Tensors, weight: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, back = self._quantize("grad_output", grad, True)
        return product(values, weight[0], (back * weight[1]).item()), product(
            values.t(), saved[0], (back * saved[1]).item()
        )


class Tensorwise(_PerTensor):
    """Current scaling: by a tensor's own largest magnitude.

    A gathered input is measured as one, as Transformer Engine does by a reduction.
    """

    def __init__(self, forms: tuple[Format, Format]) -> None:
        """Quantize in these formats, (forward, backward)."""
        self._forward, self._backward = forms

    def _quantize(self, name: str, matrix: torch.Tensor, training: bool) -> Scaled:
        return with_current_scale(
            matrix, self._backward if name == "grad_output" else self._forward
        )


class Delayed(_PerTensor):
    """Delayed scaling of one layer.

    Passes without gradients (validation) leave no trace in the histories.
    """

    def __init__(self, scaling: DelayedScaling) -> None:
        """Reserve this layer's slots in the scaling of its rank."""
        self._scaling = scaling
        self._at = {
            name: scaling.forward.scale.numel() + slot for name, slot in FORWARD_SLOTS.items()
        }
        self._at |= {
            name: scaling.backward.scale.numel() + slot for name, slot in BACKWARD_SLOTS.items()
        }
        self._columns = {
            "fwd": (
                scaling.forward,
                slice(scaling.forward.add(FORWARD_WIDTH), scaling.forward.scale.numel()),
            ),
            "bwd": (
                scaling.backward,
                slice(scaling.backward.add(BACKWARD_WIDTH), scaling.backward.scale.numel()),
            ),
        }

    def _quantize(self, name: str, matrix: torch.Tensor, training: bool) -> Scaled:
        track = self._scaling.backward if name in BACKWARD_SLOTS else self._scaling.forward
        return track.quantize(matrix, self._at[name], record=training)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of this layer's scales [n] and histories [length, n].

        The names are those of `extra_state.TENSORS`.
        """
        found = {}
        for direction, (track, columns) in self._columns.items():
            found[f"scale_{direction}"] = track.scale[columns].clone()
            found[f"amax_history_{direction}"] = track.history[:, columns].clone()
        return found

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put a `state` back."""
        for direction, (track, columns) in self._columns.items():
            track.scale[columns] = state[f"scale_{direction}"]
            track.history[:, columns] = state[f"amax_history_{direction}"]


class _ByBlocks:
    """One scale per block, a power of two; operands are scaled back exactly before the product.

    Rows are tokens (of a weight: outputs).
    """

    def _rowwise(self, matrix: torch.Tensor, form: Format) -> torch.Tensor:
        raise NotImplementedError

    def _columnwise(self, matrix: torch.Tensor, form: Format) -> torch.Tensor:
        raise NotImplementedError

    def __init__(self, forms: tuple[Format, Format]) -> None:
        self._forward, self._backward = forms

    def weight(self, weight: torch.Tensor, *, training: bool) -> Tensors:
        rowwise = self._rowwise(weight, self._forward)
        return (rowwise, self._columnwise(weight, self._forward)) if training else (rowwise,)

    def forward(
        self, x: torch.Tensor, weight: Tensors, bias: torch.Tensor | None, *, training: bool
    ) -> tuple[torch.Tensor, Tensors]:
        y = product(self._rowwise(x, self._forward), weight[0].t(), bias=bias)
        return y, (self._columnwise(x, self._forward),) if training else ()

    def backward(
        self, grad: torch.Tensor, saved: Tensors, weight: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dx = product(self._rowwise(grad, self._backward), weight[-1])
        return dx, product(self._columnwise(grad, self._backward).t(), saved[0])


class Mxfp8(_ByBlocks):
    """MXFP8: 1 x 32 along the summed dimension, weights too."""

    def _rowwise(self, matrix: torch.Tensor, form: Format) -> torch.Tensor:
        return by_micro_blocks(matrix, form, 1)

    def _columnwise(self, matrix: torch.Tensor, form: Format) -> torch.Tensor:
        return by_micro_blocks(matrix, form, 0)


class Blockwise(_ByBlocks):
    """1 x 128 blocks along the summed dimension; weights in squares of 128 x 128.

    The squares are the same for both products.
    """

    def weight(self, weight: torch.Tensor, *, training: bool) -> Tensors:
        """Quantize a weight in squares."""
        return (by_blocks(weight, self._forward, (BLOCK, BLOCK)),)

    def _rowwise(self, matrix: torch.Tensor, form: Format) -> torch.Tensor:
        return by_blocks(matrix, form, (1, BLOCK))

    def _columnwise(self, matrix: torch.Tensor, form: Format) -> torch.Tensor:
        return by_blocks(matrix, form, (BLOCK, 1))
