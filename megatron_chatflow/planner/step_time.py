"""Seconds of a training step from a layout and an accelerator's data sheet, in parts.

The slowest pipeline stage sets the pace: its time per micro-batch times the micro-batches, its idle
time while the pipeline fills and drains (Narayanan et al. 2021, arXiv 2104.04473), transfers
between stages, what the computation does not hide of the data-parallel collectives, and the
optimizer. All parts are then scaled by one factor: `DEFAULT_FACTOR`, or that of a measured step on
the same accelerator and in the same precision (`calibration_factor`). It represents what no data
sheet has: clocks under the power limit, the quality of kernels, gaps between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_chatflow.planner.accelerators import Accelerator
from megatron_chatflow.planner.layer_time import (
    COEFFICIENTS,
    Coefficients,
    LayerTimes,
    PassTime,
    exposed,
)
from megatron_chatflow.planner.step_settings import PRECISIONS, StepSettings, check_precision

DEFAULT_FACTOR = 1.10
"""Measured over modeled time without a measurement: the geometric mean over the calibration rows of
``benchmarks/step_time.py``, one per system and precision. It is the only fitted number."""

EXPECTED_ERROR = {"calibrated": (0.07, 0.30), "not calibrated": (0.10, 0.27)}
"""{whether a measured step gave the factor: (mean, worst) relative error of tokens/s}, measured by
``benchmarks/step_time.py`` on the rows that the factor was not taken from, rounded up."""


@dataclass(frozen=True)
class StepTime:
    """A predicted step."""

    seconds: float
    parts: Mapping[str, float]
    """Seconds by part, of the slowest pipeline stage; they add up to `seconds`."""
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu: float
    """Model FLOPs over the peak of the layers' precision, 0 to 1."""


def predict_step(
    step: StepSettings,
    accelerator: Accelerator,
    factor: float = DEFAULT_FACTOR,
    coefficients: Coefficients = COEFFICIENTS,
) -> StepTime:
    """Return the predicted time of a step.

    Args:
        step: settings and layout.
        accelerator: the GPU, one per process.
        factor: of `calibration_factor`.
        coefficients: efficiencies that data sheets do not have.

    Raises:
        ConfigError: the accelerator has no products of the step's precision.
    """
    check_precision(step, accelerator)
    parts = {
        name: factor * seconds for name, seconds in _parts(step, accelerator, coefficients).items()
    }
    seconds = sum(parts.values())
    rate = step.tokens / seconds
    per_gpu = rate / step.world_size
    peak = accelerator.peaks[PRECISIONS[step.precision].peak]
    return StepTime(seconds, parts, rate, per_gpu, per_gpu * step.flops_per_token / peak)


def calibration_factor(step: StepSettings, accelerator: Accelerator, seconds: float) -> float:
    """Return the factor with which the model takes `seconds` for this step, as it was measured.

    It holds for other layouts and models on the same accelerator in the same precision.
    """
    return seconds / predict_step(step, accelerator, factor=1).seconds


def _parts(
    step: StepSettings, accelerator: Accelerator, coefficients: Coefficients
) -> dict[str, float]:
    """Return the seconds of a step by part, before the factor."""
    times = LayerTimes(step, accelerator, coefficients)
    forward, backward, stages = _stage_times(step, times)
    slowest = max(stages, key=lambda stage: stage.total)
    count = step.micro_batches
    parts = {name: count * value for name, value in dataclasses.asdict(slowest).items()}
    # A micro-batch passes the other stages once: with equal stages (pp - 1) / chunks of a stage's
    # time. Exact in 1F1B where the last stage, with the output layer, is the slowest.
    others = sum(stage.total for stage in stages) - slowest.total
    parts["bubble"] = others / step.chunks
    parts["pipeline_parallel"] = count * _transfers(step, accelerator, coefficients)
    parts["data_parallel"] = _data_parallel(
        step, accelerator, coefficients, forward, backward, count * slowest.total
    )
    parts["optimizer"] = _optimizer(step, accelerator, coefficients)
    return parts


def _stage_times(step: StepSettings, times: LayerTimes) -> tuple[float, float, list[PassTime]]:
    """Return (seconds of a stage's forward pass, backward pass, time of each stage).

    The first two are those of the first stage, for one micro-batch.
    """
    kinds = (PRECISIONS[step.precision], PRECISIONS["bf16"])
    forward = [times.forward(kind) for kind in kinds]
    backward = [times.backward(kind) + times.recomputation(kind) for kind in kinds]
    layers = [a + b for a, b in zip(forward, backward, strict=True)]
    stages = [layers[0] * low + layers[1] * high for low, high in step.stages]
    stages[-1] += times.output_layer()
    first = step.stages[0]
    return (
        sum(n * time.total for n, time in zip(first, forward, strict=True)),
        sum(n * time.total for n, time in zip(first, backward, strict=True)),
        stages,
    )


def _transfers(step: StepSettings, accelerator: Accelerator, c: Coefficients) -> float:
    """Return the exposed seconds in which a stage sends and receives, per micro-batch.

    The interleaved schedule overlaps its transfers with computation, 1F1B waits for them.
    """
    pp, tp = step.pipeline_model_parallel_size, step.tensor_model_parallel_size
    if pp == 1:
        return 0
    shards = tp if step.sequence_parallel else 1
    tokens = step.micro_batch_size * step.seq_length / step.context_parallel_size
    size = tokens * step.hidden_size * step.activation_bytes / shards
    inside = step.world_size <= accelerator.nvlink_gpus
    bandwidth = accelerator.nvlink_bandwidth if inside else accelerator.network_bandwidth
    seconds = 2 * step.chunks * (size / (bandwidth * c.links) + c.collective)
    return seconds * (1 - c.overlap) if step.chunks > 1 else seconds


def _data_parallel(
    step: StepSettings,
    accelerator: Accelerator,
    c: Coefficients,
    forward: float,
    backward: float,
    computation: float,
) -> float:
    """Return the exposed seconds of gradient reduction and parameter gathering.

    Args:
        step: settings.
        accelerator: the GPU.
        c: efficiencies.
        forward: seconds of a stage's forward pass.
        backward: of its backward pass.
        computation: of all micro-batches.
    """
    size = step.data_parallel_size * step.context_parallel_size
    if size == 1:
        return 0
    bandwidth = accelerator.group_bandwidth(size, step.tensor_model_parallel_size) * c.links
    parameters = max(step.stage_parameters) * (size - 1) / size
    reduce = parameters * step.gradient_bytes / bandwidth
    gather = parameters * step.parameter_bytes / bandwidth
    if step.use_megatron_fsdp:  # gathered for both passes and reduced, in every micro-batch
        total = step.micro_batches * (2 * gather + reduce)
        return exposed(total, computation, c.overlap)
    # A chunk's gradients are complete while the chunks before it still compute: with v chunks,
    # (v - 1) / v of the last pp micro-batches; without interleaving, one micro-batch.
    pp, chunks = step.pipeline_model_parallel_size, step.chunks
    window = max(1, pp * (chunks - 1) / chunks)
    if not step.use_distributed_optimizer:  # an all-reduce: reduced, and gathered as gradients
        reduce, gather = 2 * reduce, 0
    reduced = exposed(reduce, window * backward, c.overlap if step.overlap_grad_reduce else 0)
    return reduced + exposed(
        gather, window * forward, c.overlap if step.overlap_param_gather else 0
    )


def _optimizer(step: StepSettings, accelerator: Accelerator, c: Coefficients) -> float:
    """Return the seconds of the optimizer: state is read and written, gradients are read twice."""
    sharded = step.use_distributed_optimizer or step.use_megatron_fsdp
    shards = step.data_parallel_size * step.context_parallel_size if sharded else 1
    moved = 2 * step.optimizer_bytes + 2 * step.gradient_bytes + step.activation_bytes
    return max(step.stage_parameters) / shards * moved / (accelerator.memory_bandwidth * c.memory)
