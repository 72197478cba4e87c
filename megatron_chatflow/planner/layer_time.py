"""Seconds of one layer and of the output layer for one micro-batch on one rank.

A product of (m, k) and (k, n) takes its operations over the peak, and the bytes of its operands
over the memory's bandwidth: small products are slower for the second term. Everything else of a
layer moves bytes. Communication is exposed where no computation hides it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_chatflow.planner.accelerators import Accelerator
from megatron_chatflow.planner.step_settings import PRECISIONS, Precision, StepSettings


@dataclass(frozen=True)
class Coefficients:
    """What data sheets do not say. None of these is fitted to step times."""

    products: float = 0.75
    """Of the peak, in large products. Assumed: benchmarks of bf16 products reach about 80% at best
    ("Maximum Achievable Matmul FLOPS" in Machine Learning Engineering by S. Bekman)."""
    attention: float = 0.5
    """Of the bf16 peak, in causal attention forward and backward. Assumed: at head width 128 and
    8k tokens FlashAttention-3 (arXiv 2407.08608) has about 65% forward, less backward."""
    memory: float = 0.75
    """Of the memory's bandwidth, in kernels that move bytes. Assumed, as the rest is."""
    links: float = 0.75
    """Of a link's bandwidth, in collectives on large messages."""
    overlap: float = 0.9
    """Of communication that runs next to long enough computation, the fraction it hides."""
    tp_overlap: float = 0.8
    """The same for the collectives of ``tp_comm_overlap``."""
    kernel: float = 5e-6
    """Seconds that a kernel takes beyond its work: launch, first and last waves."""
    collective: float = 10e-6
    """Seconds that a collective takes beyond its bytes."""


COEFFICIENTS = Coefficients()

_KERNELS_FORWARD, _KERNELS_BACKWARD = 20, 40
"""Kernels of a layer's passes."""


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass over one layer, by part; the names are those that are printed."""

    products: float = 0
    attention: float = 0
    memory: float = 0
    launches: float = 0
    tensor_parallel: float = 0
    context_parallel: float = 0

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: PassTime) -> PassTime:
        """Add part by part."""
        return PassTime(
            *(
                a + b
                for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )

    def __mul__(self, factor: float) -> PassTime:
        """Scale every part."""
        return PassTime(*(factor * a for a in dataclasses.astuple(self)))


def exposed(communication: float, computation: float, overlap: float) -> float:
    """Return the seconds of communication that computation next to it does not hide."""
    return communication - overlap * min(communication, computation)


@dataclass(frozen=True)
class LayerTimes:
    """Times of the layers of a step on an accelerator."""

    step: StepSettings
    accelerator: Accelerator
    coefficients: Coefficients = COEFFICIENTS

    @property
    def _tokens(self) -> float:
        """Tokens of a micro-batch on a rank, before sequence parallelism."""
        s = self.step
        return s.micro_batch_size * s.seq_length / s.context_parallel_size

    @property
    def _shards(self) -> int:
        """Ranks that share the tokens outside of the products."""
        return self.step.tensor_model_parallel_size if self.step.sequence_parallel else 1

    def forward(self, precision: Precision) -> PassTime:
        """Return the time of a layer's forward pass."""
        s, n = self.step, self._tokens
        tp, h, f = s.tensor_model_parallel_size, s.hidden_size, s.ffn_hidden_size / tp_of(s)
        gates = 2 if s.swiglu else 1
        attention = self._attention_flops()
        # Inputs of the four products, quantized on each rank: [h], [queries], [h], [ffn] a token.
        quantized = precision.quantize * (2 * h + s.queries / tp + f)
        # Two norms (read, write) and two residual additions (two reads, a write), [h] a token;
        # rotary positions (read, write), queries and keys; the activation function, [ffn].
        moved = s.activation_bytes * (
            (2 * 2 + 2 * 3) * h / self._shards + 2 * (s.queries + s.keys) / tp + (gates + 1) * f
        )
        products = sum(self._product(n, k, m, precision) for k, m in self._matrices())
        return PassTime(
            products=products,
            attention=attention,
            memory=self._move(n * (quantized + moved)),
            launches=_KERNELS_FORWARD * self.coefficients.kernel,
            tensor_parallel=self._tensor_parallel(2, 0, precision, products),
            context_parallel=self._context_parallel(1, attention),
        )

    def backward(self, precision: Precision) -> PassTime:
        """Return the time of a layer's backward pass, without recomputation."""
        s, n = self.step, self._tokens
        tp, h, f = s.tensor_model_parallel_size, s.hidden_size, s.ffn_hidden_size / tp_of(s)
        gates = 2 if s.swiglu else 1
        attention = 2.5 * self._attention_flops()  # five products for the forward pass's two
        # Gradients of the products' outputs: [queries + 2 keys], [h], [gates ffn], [h] a token.
        quantized = precision.quantize * (2 * h + (s.queries + 2 * s.keys) / tp + gates * f)
        # Norms read their input and its gradient and write a gradient; the rest as forward.
        moved = s.activation_bytes * (
            (2 * 3 + 2 * 3) * h / self._shards + 2 * (s.queries + s.keys) / tp + (2 * gates + 1) * f
        )
        products = sum(
            self._product(n, m, k, precision)
            + self._product(k, n, m, precision, output=2 * s.gradient_bytes)
            for k, m in self._matrices()
        )
        return PassTime(
            products=products,
            attention=attention,
            memory=self._move(n * (quantized + moved)),
            launches=_KERNELS_BACKWARD * self.coefficients.kernel,
            tensor_parallel=self._tensor_parallel(2, 2, precision, products),
            context_parallel=self._context_parallel(2, attention),
        )

    def recomputation(self, precision: Precision) -> PassTime:
        """Return what is computed again in a layer's backward pass, on average over the layers."""
        s, forward = self.step, self.forward(precision)
        if s.recompute_granularity == "full":
            return forward * s.recomputed
        if s.recompute_granularity != "selective":
            return PassTime()
        again = PassTime()
        if "core_attn" in s.recompute_modules:
            again += PassTime(attention=forward.attention)
        if "mlp" in s.recompute_modules:
            n, f = self._tokens, s.ffn_hidden_size / tp_of(s)
            products = sum(self._product(n, k, m, precision) for k, m in self._matrices()[2:])
            moved = s.activation_bytes * (3 if s.swiglu else 2) * f
            again += PassTime(
                products=products,
                memory=self._move(n * (moved + precision.quantize * (s.hidden_size + f))),
                tensor_parallel=self._tensor_parallel(1, 0, precision, products),
            )
        if "layernorm" in s.recompute_modules:
            moved = 2 * 2 * s.activation_bytes * s.hidden_size / self._shards
            again += PassTime(memory=self._move(self._tokens * moved))
        return again

    def output_layer(self) -> PassTime:
        """Return the time of the output layer and the loss, forward and backward."""
        s, n = self.step, self._tokens
        columns, h = s.padded_vocab_size / tp_of(s), s.hidden_size
        plain = PRECISIONS["float32" if s.activation_bytes == 4 else "bf16"]
        products = (
            self._product(n, h, columns, plain)
            + self._product(n, columns, h, plain)
            + self._product(h, n, columns, plain, output=2 * s.gradient_bytes)
        )
        # Logits are read, converted to float32, exponentiated, and their gradient is written.
        loss = self._move(n * columns * (2 * s.activation_bytes + 2 * 4))
        return PassTime(
            products=products,
            memory=loss,
            tensor_parallel=self._tensor_parallel(1, 0, plain, products),
        )

    def _matrices(self) -> list[tuple[float, float]]:
        """Return (inputs, outputs) of a layer's four products on one tensor-parallel rank."""
        s, tp = self.step, self.step.tensor_model_parallel_size
        h, f, gates = s.hidden_size, s.ffn_hidden_size, 2 if s.swiglu else 1
        return [
            (h, (s.queries + 2 * s.keys) / tp),
            (s.queries / tp, h),
            (h, gates * f / tp),
            (f / tp, h),
        ]

    def _product(
        self, m: float, k: float, n: float, precision: Precision, output: float | None = None
    ) -> float:
        """Return the seconds of (m, k) times (k, n); `output` is the bytes per result."""
        peak = self.accelerator.peaks[precision.peak] * self.coefficients.products
        written = self.step.activation_bytes if output is None else output
        moved = (m * k + k * n) * precision.element + m * n * written
        return 2 * m * k * n / peak + self._move(moved)

    def _attention_flops(self) -> float:
        """Return the seconds of causal attention's two products in the forward pass."""
        s = self.step
        flops = 2 * self._tokens * s.seq_length * s.queries / s.tensor_model_parallel_size
        peak = self.accelerator.peaks["fp32" if s.activation_bytes == 4 else "bf16"]
        return flops / (peak * self.coefficients.attention)

    def _move(self, moved: float) -> float:
        return moved / (self.accelerator.memory_bandwidth * self.coefficients.memory)

    def _tensor_parallel(
        self, pairs: int, again: int, precision: Precision, products: float
    ) -> float:
        """Return the exposed seconds of the collectives of a pass.

        Args:
            pairs: all-gather and reduce-scatter, before and after a group of products; without
                sequence parallelism one all-reduce of the same volume.
            again: all-gathers of inputs that the weight gradients need, with sequence parallelism.
            precision: of the layer. Inputs are gathered as they are multiplied.
            products: seconds of the pass's products.
        """
        s, c, tp = self.step, self.coefficients, self.step.tensor_model_parallel_size
        if tp == 1:
            return 0
        gathered = precision.element if s.sequence_parallel else s.activation_bytes
        extra = again if s.sequence_parallel else 0
        per_token = pairs * (gathered + s.activation_bytes) + extra * gathered
        bandwidth = self.accelerator.group_bandwidth(tp, 1) * c.links
        seconds = self._tokens * s.hidden_size * per_token * (tp - 1) / tp / bandwidth
        seconds += (2 * pairs + extra) * c.collective
        return exposed(seconds, products, c.tp_overlap if s.tp_comm_overlap else 0)

    def _context_parallel(self, passes: int, attention: float) -> float:
        """Return the exposed seconds in which keys and values go around the ring of ranks."""
        s, c, cp, tp = (
            self.step,
            self.coefficients,
            self.step.context_parallel_size,
            tp_of(self.step),
        )
        if cp == 1:
            return 0
        bandwidth = self.accelerator.group_bandwidth(cp, tp) * c.links
        size = self._tokens * 2 * s.keys / tp * s.activation_bytes
        seconds = passes * (cp - 1) * (size / bandwidth + c.collective)
        return exposed(seconds, attention, c.overlap)


def tp_of(step: StepSettings) -> int:
    """Return the tensor-parallel size."""
    return step.tensor_model_parallel_size
