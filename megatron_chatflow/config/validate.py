"""Fill in the defaults that depend on others, and check the settings against each other.

`resolve`, `resolve_model` and `resolve_data` return the settings that training, running a model and
reading the blend need. Each reports every independent error at once, with `ConfigErrors`. The
checks of one section alone are the ``validate`` of its class; those between sections are here. They
need no corpus and no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from megatron_chatflow.config.derived import Schedule, total_samples
from megatron_chatflow.config.pipeline_layout import (
    chunk_sizes,
    split_layers,
    virtual_pipeline_size,
)
from megatron_chatflow.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ResolvedConfig,
    sections,
)
from megatron_chatflow.config.schema.section import convert_to
from megatron_chatflow.config.validate_fp8 import FP8_CHECKS
from megatron_chatflow.errors import ErrorCollector

_C = TypeVar("_C", bound=Config)
_DATA_SECTIONS = ("training", "checkpoint", "data", "tokenizer", "validation", "logging")
_MODEL_SECTIONS = ("model", "parallel", "training", "precision", "data", "tokenizer", "validation")


def resolve(config: Config, world_size: int) -> ResolvedConfig:
    """Fill in every dependent default and check the settings against `world_size` processes.

    Raises ConfigError for missing settings and for settings that contradict each other: a message
    per error, with the names and what to do.
    """
    filled = _fill_in_model(config, world_size)
    errors = _Errors(config, [name for name, _ in sections()])
    _check_layout(errors, filled, world_size)
    _check_batches(errors, filled, data_parallel_size(config, world_size))
    errors.run("recompute", _recompute, filled, needs=("training", "precision", "pipeline"))
    for name, check, needs in FP8_CHECKS:
        errors.run(name, check, filled, needs=needs)
    errors.run("sgd", _sgd, filled, needs=("optimizer", "parallel"))
    errors.run("schedule", _schedule, filled, needs=("optimizer", "length"))
    errors.raise_all()
    return convert_to(ResolvedConfig, filled, optimizer=config.optimizer.resolve())


def resolve_model(config: Config, world_size: int) -> ModelConfig:
    """Resolve what running a model needs without training it (`evaluate`, `generate`).

    The length of the run, the optimizer and its schedule are neither needed nor checked. Raises
    ConfigError as `resolve` does.
    """
    if not config.data.seq_length:
        config = config.replace(seq_length=config.model.max_position_embeddings or 0)
    filled = _fill_in_model(config, world_size)
    errors = _Errors(config, _MODEL_SECTIONS)
    _check_layout(errors, filled, world_size)
    errors.run("interleaved", _not_interleaved, filled, needs=("pipeline",))
    for name, check, needs in FP8_CHECKS:
        errors.run(name, check, filled, needs=needs)
    errors.raise_all()
    return filled


def resolve_data(config: Config) -> DataConfig:
    """Resolve what reading the blend needs, without a model or a layout. Raises ConfigError."""
    filled = convert_to(DataConfig, config, training=config.training.resolve(1))
    errors = _Errors(config, _DATA_SECTIONS)
    errors.run("length", _length, filled, needs=("training",))
    errors.run("batches", lambda c: _batches(c, 1), filled, needs=("training",))
    errors.raise_all()
    return filled


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the number of processes with the same part of the model, at least 1."""
    p = config.parallel
    shared = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    return max(1, world_size // max(1, shared))


class _Errors(ErrorCollector):
    """The errors of one configuration.

    A check runs only where the sections and the earlier checks that it needs are without errors, so
    that no error is a consequence of another one.
    """

    def __init__(self, config: Config, names: Iterable[str]) -> None:
        super().__init__()
        self._valid: set[str] = set()
        for name in names:
            self.run(name, lambda c, name=name: getattr(c, name).validate(), config)

    def run(
        self,
        name: str,
        check: Callable[[_C], Iterable[str]],
        config: _C,
        needs: Iterable[str] = (),
    ) -> None:
        """Run a check that returns its messages or raises ConfigError."""
        if not self._valid.issuperset(needs):
            return
        before = len(self.messages)
        with self.collect():
            self.add(*check(config))
        if len(self.messages) == before:
            self._valid.add(name)


def _fill_in_model(config: Config, world_size: int) -> ModelConfig:
    return convert_to(
        ModelConfig,
        config,
        model=config.model.resolve(config.data.seq_length),
        training=config.training.resolve(data_parallel_size(config, world_size)),
    )


def _check_layout(errors: _Errors, config: ModelConfig, world_size: int) -> None:
    errors.run("positions", _positions, config, needs=("model", "data"))
    errors.run("tensor", _tensor_parallel, config, needs=("model", "parallel"))
    errors.run("sequence", _sequence_parallel, config, needs=("parallel", "data"))
    errors.run("pipeline", _pipeline, config, needs=("model", "parallel"))
    errors.run("layout", lambda c: _world_size(c, world_size), config, needs=("parallel",))


def _check_batches(errors: _Errors, config: ModelConfig, dp: int) -> None:
    errors.run("length", _length, config, needs=("training",))
    errors.run("batches", lambda c: _batches(c, dp), config, needs=("training", "layout"))
    errors.run("interleaved", lambda c: _interleaved(c, dp), config, needs=("batches", "pipeline"))


def _positions(config: ModelConfig) -> Iterator[str]:
    length, positions = config.data.seq_length, config.model.max_position_embeddings
    if length > positions:
        yield (
            f"seq_length {length} is larger than max_position_embeddings {positions}; "
            "raise --max-position-embeddings or lower --seq-length"
        )


def _tensor_parallel(config: ModelConfig) -> Iterator[str]:
    m, tp = config.model, config.parallel.tensor_model_parallel_size
    heads, groups = m.num_attention_heads, m.key_value_heads
    width = (heads + 2 * groups) * m.kv_channels
    if heads % tp:
        yield (
            f"num_attention_heads {heads} is not a multiple of tensor_model_parallel_size {tp}; "
            "change one of them"
        )
    elif groups % tp and tp % groups:
        yield (
            f"num_query_groups {groups} is neither a multiple nor a divisor of "
            f"tensor_model_parallel_size {tp}; change one of them"
        )
    elif width % tp:
        yield (
            f"(num_attention_heads + 2 x num_query_groups) x kv_channels is {width}, not a "
            f"multiple of tensor_model_parallel_size {tp}; change one of them"
        )
    if m.ffn_hidden_size % tp:
        yield (
            f"ffn_hidden_size {m.ffn_hidden_size} is not a multiple of "
            f"tensor_model_parallel_size {tp}; change one of them"
        )


def _sequence_parallel(config: ModelConfig) -> Iterator[str]:
    length, tp = config.data.seq_length, config.parallel.tensor_model_parallel_size
    if config.parallel.sequence_parallel and length % tp:
        yield (
            f"seq_length {length} is not a multiple of tensor_model_parallel_size {tp}, "
            "which sequence_parallel needs; change one of them"
        )


def _pipeline(config: ModelConfig) -> Iterable[str]:
    split_layers(config.parallel, config.model.num_layers)
    return ()


def _not_interleaved(config: ModelConfig) -> Iterator[str]:
    if config.parallel.num_layers_per_virtual_pipeline_stage:
        yield (
            "num_layers_per_virtual_pipeline_stage is for training only; drop "
            "--num-layers-per-virtual-pipeline-stage"
        )
    elif virtual_pipeline_size(config.parallel, config.model.num_layers) > 1:
        yield (
            "pipeline_model_parallel_layout: an interleaved schedule is for training only; give "
            "one stage for each pipeline rank"
        )


def _world_size(config: ModelConfig, world_size: int) -> Iterator[str]:
    p = config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    if world_size % (tp * pp):
        yield (
            f"{world_size} process{'es are' if world_size > 1 else ' is'} not a multiple of "
            f"tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}; "
            f"start {tp * pp} processes (torchrun --nproc-per-node {tp * pp}) or change the two"
        )


def _length(config: DataConfig) -> Iterable[str]:
    errors = config.training.length_errors()
    if not errors:
        total_samples(config)
    return errors


def _batches(config: DataConfig, dp: int) -> Iterator[str]:
    t = config.training
    step = t.micro_batch_size * dp
    if t.global_batch_size % step:
        yield (
            f"global_batch_size {t.global_batch_size} is not a multiple of micro_batch_size "
            f"{t.micro_batch_size} x data-parallel size {dp}; change one of them"
        )
    if t.rampup_batch_size is None:
        return
    if t.train_iters is not None:
        yield (
            "rampup_batch_size needs the run's length in samples; give --train-samples "
            "instead of --train-iters"
        )
    if len(t.rampup_batch_size) != 3:
        yield (
            f"rampup_batch_size has {len(t.rampup_batch_size)} numbers; write "
            "--rampup-batch-size START INCREMENT SAMPLES"
        )
        return
    start, increment, samples = t.rampup_batch_size
    if (
        min(start, increment, samples) < 1
        or start >= t.global_batch_size
        or (t.global_batch_size - start) % increment
    ):
        yield (
            f"rampup_batch_size {start} {increment} {samples} does not lead to "
            f"global_batch_size {t.global_batch_size}; START must be smaller and the difference "
            "a multiple of INCREMENT"
        )
    for name, value in (("START", start), ("INCREMENT", increment)):
        if value % step:
            yield (
                f"rampup_batch_size {name} {value} is not a multiple of micro_batch_size "
                f"{t.micro_batch_size} x data-parallel size {dp}; change one of them"
            )


def _interleaved(config: DataConfig, dp: int) -> Iterator[str]:
    t, p = config.training, config.parallel
    if virtual_pipeline_size(p, config.model.num_layers) == 1:
        return
    step = t.micro_batch_size * dp
    for size in (*(t.rampup_batch_size or ())[:1], t.global_batch_size):
        if (size // step) % p.pipeline_model_parallel_size:
            yield (
                f"global_batch_size {size} makes {size // step} micro-batches per rank, "
                f"not a multiple of pipeline_model_parallel_size {p.pipeline_model_parallel_size}, "
                "which the interleaved schedule needs; change --global-batch-size or "
                "--micro-batch-size"
            )


def _recompute(config: ModelConfig) -> Iterator[str]:
    t, p = config.training, config.precision
    if "layernorm" in (t.recompute_modules or ()) and (
        p.fp8_format is not None and p.fp8_recipe == "delayed"
    ):
        yield (
            "recompute_modules layernorm does not go with fp8_recipe delayed, whose products keep "
            "FP8 copies of the norm; drop layernorm or choose another --fp8-recipe"
        )
    count = t.recompute_num_layers
    if t.recompute_granularity != "full" or count is None:
        return
    sizes = chunk_sizes(config.parallel, config.model.num_layers)
    most = max(sizes)
    if not 1 <= count <= most:
        yield (
            f"recompute_num_layers is {count}, and a model chunk has {most} layers; give a number "
            f"from 1 to {most}"
        )
        return
    uneven = next((size for size in sorted(sizes) if size % count), None)
    if t.recompute_method == "uniform" and uneven is not None:
        yield (
            f"{uneven} layers of a model chunk are not a multiple of recompute_num_layers "
            f"{count}, which recompute_method uniform needs; change it or write "
            "--recompute-method block"
        )


def _sgd(config: ModelConfig) -> Iterator[str]:
    if config.optimizer.optimizer == "sgd" and config.parallel.use_distributed_optimizer:
        yield (
            "optimizer sgd does not go with use_distributed_optimizer: megatron-core shards and "
            "saves the state of adam only; drop --use-distributed-optimizer or write "
            "--optimizer adam"
        )


def _schedule(config: ModelConfig) -> Iterator[str]:
    schedule = Schedule.of(config)
    stable = schedule.decay - schedule.warmup
    if stable <= 0:
        yield (
            f"the warm-up of {schedule.warmup} samples is not shorter than the decay of "
            f"{schedule.decay}; lower --lr-warmup-iters, -samples or -fraction"
        )
    elif config.optimizer.lr_decay_style == "WSD" and (schedule.wsd or 0) > stable:
        yield (
            f"the last phase of WSD ({schedule.wsd} samples) is longer than what remains after "
            f"the warm-up ({stable}); shorten it"
        )
