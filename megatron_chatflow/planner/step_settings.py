"""What the step-time model reads of a run: sizes, layout and precision, with Megatron's names."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.config import ResolvedConfig, padded_vocab_size
from megatron_chatflow.config.pipeline_layout import split_layers
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.accelerators import Accelerator
from megatron_chatflow.planner.memory import element_size, fp8_layers, gradient_bytes
from megatron_chatflow.planner.memory import optimizer_bytes as bytes_of_optimizer
from megatron_chatflow.planner.parameters import (
    flops_per_token,
    layout_of,
    stage_parameters,
)


@dataclass(frozen=True)
class Precision:
    """How the products of a layer compute."""

    peak: str
    """The number format whose peak they have."""
    element: float
    """Bytes of an element of their inputs, block scales included."""
    quantize: float
    """Bytes moved to make one such element and its copy along the other dimension, as weight
    gradients need it: bf16 is read (twice where the scale needs a pass over the tensor first),
    two copies are written."""


PRECISIONS = {
    "float32": Precision("fp32", 4, 0),
    "bf16": Precision("bf16", 2, 0),
    "delayed": Precision("fp8", 1, 2 + 2),
    "tensorwise": Precision("fp8", 1, 2 + 2 + 2),
    "blockwise": Precision("fp8", 1 + 4 / 128, 2 + 2 * (1 + 4 / 128)),
    "mxfp8": Precision("fp8", 1 + 1 / 32, 2 + 2 * (1 + 1 / 32)),
    "nvfp4": Precision("fp4", 0.5 + 1 / 16, 2 + 2 + 2 + 2 * (0.5 + 1 / 16)),
}
"""{name: precision of the layers}: float32, bf16, the values of ``fp8_recipe``, and NVFP4.

NVFP4 reads the input once more, for the random Hadamard transform of the copy (NVIDIA 2025, arXiv
2509.25149). The output layer is never quantized."""


@dataclass(frozen=True)
class StepSettings:
    """One training step. Fields that are settings have their names and meanings."""

    world_size: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    swiglu: bool
    queries: int
    """Elements of all query heads of one token."""
    keys: int
    """Elements of all key heads of one token."""
    padded_vocab_size: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    tensor_model_parallel_size: int
    stages: tuple[tuple[int, int], ...]
    """Layers of each pipeline stage: (in `precision`, in bfloat16 next to an FP8 `precision`)."""
    chunks: int
    """Model chunks of a stage; more than 1 with the interleaved schedule."""
    stage_parameters: tuple[int, ...]
    """Parameters on one rank of each stage."""
    flops_per_token: float
    """Of the model, as ``--log-throughput`` counts them."""
    precision: str
    activation_bytes: int = 2
    gradient_bytes: int = 4
    optimizer_bytes: int = 12
    parameter_bytes: float = 2
    """Bytes of a parameter when data-parallel ranks gather it."""
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: str | None = None
    recompute_modules: tuple[str, ...] = ()
    recomputed: float = 0
    """Fraction of the layers that ``recompute_granularity full`` applies to."""
    context_parallel_size: int = 1
    """More than 1 only for other trainers, as are the next two fields."""
    tp_comm_overlap: bool = False
    use_megatron_fsdp: bool = False

    @property
    def pipeline_model_parallel_size(self) -> int:
        """The number of pipeline stages."""
        return len(self.stages)

    @property
    def data_parallel_size(self) -> int:
        """The number of model replicas."""
        shared = self.tensor_model_parallel_size * self.context_parallel_size
        return self.world_size // (shared * self.pipeline_model_parallel_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch_size * self.seq_length


def step_settings_of(config: ResolvedConfig, vocab_size: int, world_size: int) -> StepSettings:
    """Return the settings of a step at the full global batch size.

    Args:
        config: resolved settings.
        vocab_size: size before padding.
        world_size: processes of the job.
    """
    m, p, t = config.model, config.parallel, config.training
    layout, recipe = layout_of(config, world_size), config.precision.fp8_format
    split = split_layers(p, m.num_layers)
    layers = [[layer for chunk in stage for layer in chunk] for stage in split]
    low = [fp8_layers(config, stage) if recipe else len(stage) for stage in layers]
    return StepSettings(
        world_size=world_size,
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        swiglu=m.swiglu,
        queries=m.num_attention_heads * m.kv_channels,
        keys=m.key_value_heads * m.kv_channels,
        padded_vocab_size=padded_vocab_size(config, vocab_size),
        seq_length=config.data.seq_length,
        micro_batch_size=t.micro_batch_size,
        global_batch_size=t.global_batch_size,
        tensor_model_parallel_size=layout.tp,
        stages=tuple((n, len(stage) - n) for n, stage in zip(low, layers, strict=True)),
        chunks=layout.vpp,
        stage_parameters=tuple(
            stage_parameters(config, vocab_size, layout, stage) for stage in range(layout.pp)
        ),
        flops_per_token=flops_per_token(config, vocab_size),
        precision=config.precision.fp8_recipe if recipe else "bf16" if t.bf16 else "float32",
        activation_bytes=element_size(config),
        gradient_bytes=gradient_bytes(config),
        optimizer_bytes=bytes_of_optimizer(config),
        parameter_bytes=1 if config.precision.fp8_param_gather else element_size(config),
        sequence_parallel=p.sequence_parallel,
        use_distributed_optimizer=p.use_distributed_optimizer,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        recompute_granularity=t.recompute_granularity,
        recompute_modules=tuple(t.recompute_modules or ()),
        recomputed=_recomputed(config, layout.pp * layout.vpp),
    )


def check_precision(step: StepSettings, accelerator: Accelerator) -> None:
    """Raise ConfigError where the accelerator has no products of the step's precision."""
    peak = PRECISIONS[step.precision].peak
    if peak not in accelerator.peaks:
        flag = "--fp8-format" if peak == "fp8" else "another precision"
        raise ConfigError(
            f"accelerator: {accelerator.name} has no {peak} products, which precision "
            f"{step.precision} needs; drop {flag} or choose another accelerator"
        )


def _recomputed(config: ResolvedConfig, chunks: int) -> float:
    t = config.training
    if t.recompute_granularity != "full" or t.recompute_num_layers is None:
        return 0
    if t.recompute_method == "uniform":
        return 1
    return min(1, t.recompute_num_layers * chunks / config.model.num_layers)
