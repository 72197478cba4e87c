"""The section ``parallel``: how the model and the batch are split over the processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_chatflow.config.schema.section import Section, flag_name

_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_ACCOUNTED = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_LAYOUT = "pipeline_model_parallel_layout"
_CHUNK = "num_layers_per_virtual_pipeline_stage"


@dataclass(frozen=True)
class ParallelSettings(Section):
    """How the model and the batch are split over the processes."""

    _positive = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "distributed_timeout_minutes",
        "init_timeout",
    )

    tensor_model_parallel_size: int = 1
    """Number of processes that share every layer."""
    pipeline_model_parallel_size: int = 1
    """Number of processes that share the stack of layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers in one model chunk of the interleaved pipeline schedule; off by default."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage; the other stages share the rest equally."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage; the other stages share the rest equally."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when the layers are split: the first stage has one layer
    fewer.
    """
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and the loss as a layer when the layers are split: the last stage has
    one layer fewer.
    """
    pipeline_model_parallel_layout: str | None = None
    """Content of every stage: E embedding, t a layer, L the loss, | between stages, x*N and (...)*N
    repeat, commas are ignored, e.g. "Et*3|(tt|)*6tL". With a multiple of the pipeline-parallel size
    of stages the schedule is interleaved: stage i is a model chunk of rank i modulo that size."""
    sequence_parallel: bool = False
    """Split norms and dropouts over the sequence among the tensor-parallel processes."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    ddp_bucket_size: int | None = None
    """Parameters in one bucket of gradients under --overlap-grad-reduce; the larger of 40,000,000
    and 1,000,000 x DP by default.
    """
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass; needs --use-distributed-optimizer and
    --overlap-grad-reduce.
    """
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Backend of the collectives; nccl on CUDA, gloo on a CPU, by default."""
    distributed_timeout_minutes: int = 10
    """Minutes after which a collective that hangs ends the run."""
    init_timeout: int = 60
    """Seconds within which all processes must connect at the start; otherwise the missing ranks are
    reported and the others exit."""

    def validate(self) -> list[str]:
        """Return what is wrong with this section alone, one message per error."""
        errors = [*super().validate(), *self.split_errors()]
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            errors.append(
                "sequence_parallel has no effect with tensor_model_parallel_size 1; drop "
                "--sequence-parallel or raise --tensor-model-parallel-size"
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            errors.append(
                "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce; "
                "add --use-distributed-optimizer --overlap-grad-reduce"
            )
        if self.ddp_bucket_size == 0:
            errors.append(
                "ddp_bucket_size: 0 is not a number of parameters; give a positive number"
            )
        elif self.ddp_bucket_size is not None and not self.overlap_grad_reduce:
            errors.append(
                "ddp_bucket_size: there are no buckets without overlap_grad_reduce; "
                "add --overlap-grad-reduce or drop --ddp-bucket-size"
            )
        return errors

    def split_errors(self) -> list[str]:
        """Return the contradictions among the settings that split the layers into stages."""
        values = {name: getattr(self, name) for name in (*_ENDS, *_ACCOUNTED, _LAYOUT, _CHUNK)}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if self.pipeline_model_parallel_size == 1:
            return [
                f"{name}: it has no effect with pipeline_model_parallel_size 1; "
                f"drop {flag_name(name)} or raise --pipeline-model-parallel-size"
                for name in given
            ]
        errors = []
        for name in [name for name in _ENDS if name in given]:
            if values[name] < 1:
                errors.append(
                    f"{name}: {values[name]} is not a positive number; change {flag_name(name)}"
                )
            if _CHUNK in given:
                errors.append(
                    f"{name}: it contradicts num_layers_per_virtual_pipeline_stage, as stages have "
                    "different sizes; drop one of them or write --pipeline-model-parallel-layout"
                )
            errors += [
                f"{name}: it contradicts {other}; drop one of them"
                for other in _ACCOUNTED
                if other in given
            ]
        if _LAYOUT in given and len(given) > 1:
            other = next(name for name in given if name != _LAYOUT)
            errors.append(
                f"pipeline_model_parallel_layout: it contradicts {other}, as it places every "
                "layer; drop one of them"
            )
        return errors
