"""What follows from the settings: defaults that depend on others, lengths in samples, and the
checks that need no corpus and no process group.
"""

from __future__ import annotations

import copy
import dataclasses
import math

from megatron_chatflow.config.pipeline_layout import split_layers, virtual_pipeline_size
from megatron_chatflow.config.schema import Config, OptimizerSettings
from megatron_chatflow.config.validate_fp8 import check_precision
from megatron_chatflow.config.validate_recompute import check_recompute
from megatron_chatflow.errors import ConfigError

_MOST_SAMPLES = 1 << 53


def resolve(config: Config, world_size: int) -> Config:
    """A copy with every dependent default filled in, checked against `world_size` processes.

    Raises ConfigError for a missing setting and for two settings that contradict each other, naming
    both and the cure.
    """
    config = copy.deepcopy(config)
    dp = _resolve_model_and_layout(config, world_size)
    check_recompute(config)
    _check_batches(config, dp)
    check_precision(config)
    _check_optimizer(config)
    return config


def resolve_reading(config: Config, world_size: int) -> Config:
    """What running a model needs without training it (`evaluate`, `generate`): no length, no
    optimizer, no schedule.
    """
    config = copy.deepcopy(config)
    config.data.seq_length = config.data.seq_length or config.model.max_position_embeddings or 0
    if config.parallel.num_layers_per_virtual_pipeline_stage:
        raise ConfigError(
            "num_layers_per_virtual_pipeline_stage is for training only; drop "
            "--num-layers-per-virtual-pipeline-stage"
        )
    dp = _resolve_model_and_layout(config, world_size)
    if virtual_pipeline_size(config.parallel, config.model.num_layers) > 1:
        raise ConfigError(
            "pipeline_model_parallel_layout: model chunks that take turns are for training only; "
            "give one stage for each pipeline rank"
        )
    _positive(config.training, "micro_batch_size")
    config.training.global_batch_size = (
        config.training.global_batch_size or config.training.micro_batch_size * dp
    )
    check_precision(config)
    return config


def _resolve_model_and_layout(config: Config, world_size: int) -> int:
    """Fills in and checks what the model and its layout are; returns the data-parallel size."""
    for section, name in (
        (config.model, "num_layers"),
        (config.model, "hidden_size"),
        (config.model, "num_attention_heads"),
        (config.data, "seq_length"),
    ):
        _positive(section, name)
    for section in (getattr(config, f.name) for f in dataclasses.fields(config)):
        for f in dataclasses.fields(section):
            value = getattr(section, f.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                raise ConfigError(
                    f"{f.name} is {value}; give {_flag(f.name)} a number that is not negative"
                )
    _resolve_model(config)
    return _check_layout(config, world_size)


def resolve_data(config: Config) -> Config:
    """What reading the blend needs, without a model or a layout: batches, length and seq_length
    filled in and checked.
    """
    config = copy.deepcopy(config)
    _positive(config.data, "seq_length")
    _check_batches(config, 1)
    return config


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _positive(section: object, name: str) -> None:
    if getattr(section, name) <= 0:
        raise ConfigError(
            f"{name} is {getattr(section, name) or 'missing'}; give {_flag(name)} a positive number"
        )


def _resolve_model(config: Config) -> None:
    m = config.model
    if m.hidden_size % m.num_attention_heads and not m.kv_channels:
        raise ConfigError(
            f"hidden_size {m.hidden_size} is not a multiple of num_attention_heads "
            f"{m.num_attention_heads}; change one of them or give --kv-channels"
        )
    m.kv_channels = m.kv_channels or m.hidden_size // m.num_attention_heads
    if m.ffn_hidden_size is None:
        m.ffn_hidden_size = (
            int(4 * m.hidden_size * 2 / 3) // 64 * 64 if m.swiglu else 4 * m.hidden_size
        )
    if m.ffn_hidden_size <= 0:
        raise ConfigError(
            f"ffn_hidden_size is {m.ffn_hidden_size} for hidden_size {m.hidden_size}; give "
            f"--ffn-hidden-size a positive number"
        )
    if m.num_query_groups and not m.group_query_attention:
        raise ConfigError(
            f"num_query_groups {m.num_query_groups} has no effect without "
            f"group_query_attention; add "
            "--group-query-attention or drop --num-query-groups"
        )
    if m.group_query_attention and not m.num_query_groups:
        raise ConfigError("group_query_attention needs num_query_groups; add --num-query-groups N")
    groups = m.num_query_groups or m.num_attention_heads
    if m.num_attention_heads % groups:
        raise ConfigError(
            f"num_attention_heads {m.num_attention_heads} is not a multiple of "
            f"num_query_groups {groups}; change one of them"
        )
    m.max_position_embeddings = m.max_position_embeddings or config.data.seq_length
    if config.data.seq_length > m.max_position_embeddings:
        raise ConfigError(
            f"seq_length {config.data.seq_length} is larger than max_position_embeddings "
            f"{m.max_position_embeddings}; "
            "raise --max-position-embeddings or lower --seq-length"
        )
    if m.rotary_seq_len_interpolation_factor == 0:
        raise ConfigError(
            "rotary_seq_len_interpolation_factor is 0; give "
            "--rotary-seq-len-interpolation-factor a positive number or leave it out"
        )
    for name in ("attention_dropout", "hidden_dropout"):
        if not 0 <= getattr(m, name) < 1:
            raise ConfigError(
                f"{name} is {getattr(m, name)}; give {_flag(name)} a number from 0 up to, "
                f"not including, 1"
            )
    if m.make_vocab_size_divisible_by < 1:
        raise ConfigError(
            "make_vocab_size_divisible_by is 0; give --make-vocab-size-divisible-by a "
            "positive number"
        )


def _check_layout(config: Config, world_size: int) -> int:
    m, p = config.model, config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "distributed_timeout_minutes",
        "init_timeout",
    ):
        _positive(p, name)
    for name, value in (
        ("num_attention_heads", m.num_attention_heads),
        ("ffn_hidden_size", m.ffn_hidden_size),
    ):
        if value % tp:
            raise ConfigError(
                f"{name} {value} is not a multiple of tensor_model_parallel_size {tp}; "
                f"change one of them"
            )
    groups = m.num_query_groups or m.num_attention_heads
    if groups % tp and tp % groups:
        raise ConfigError(
            f"num_query_groups {groups} is neither a multiple nor a divisor of "
            f"tensor_model_parallel_size {tp}; "
            "change one of them"
        )
    width = (m.num_attention_heads + 2 * groups) * m.kv_channels
    if width % tp:
        raise ConfigError(
            f"(num_attention_heads + 2 x num_query_groups) x kv_channels is {width}, not a "
            f"multiple of "
            f"tensor_model_parallel_size {tp}; change one of them"
        )
    if p.sequence_parallel and tp == 1:
        raise ConfigError(
            "sequence_parallel has no effect with tensor_model_parallel_size 1; drop "
            "--sequence-parallel or raise --tensor-model-parallel-size"
        )
    if p.sequence_parallel and config.data.seq_length % tp:
        raise ConfigError(
            f"seq_length {config.data.seq_length} is not a multiple of "
            f"tensor_model_parallel_size {tp}, "
            "which sequence_parallel needs; change one of them"
        )
    split_layers(p, m.num_layers)
    if p.overlap_param_gather and not (p.use_distributed_optimizer and p.overlap_grad_reduce):
        raise ConfigError(
            "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce; "
            "add --use-distributed-optimizer --overlap-grad-reduce"
        )
    if p.ddp_bucket_size is not None:
        if p.ddp_bucket_size < 1:
            raise ConfigError(
                f"ddp_bucket_size: {p.ddp_bucket_size} is not a number of parameters; "
                "give a positive number"
            )
        if not p.overlap_grad_reduce:
            raise ConfigError(
                "ddp_bucket_size: there are no buckets without overlap_grad_reduce; "
                "add --overlap-grad-reduce or drop --ddp-bucket-size"
            )
    if world_size % (tp * pp):
        raise ConfigError(
            f"{world_size} process{'es are' if world_size > 1 else ' is'} not a multiple of "
            f"tensor_model_parallel_size "
            f"{tp} x pipeline_model_parallel_size {pp}; "
            f"start {tp * pp} processes (torchrun --nproc-per-node {tp * pp}) or change the two"
        )
    return world_size // (tp * pp)


def _check_batches(config: Config, dp: int) -> None:
    t, p = config.training, config.parallel
    _positive(t, "micro_batch_size")
    step = t.micro_batch_size * dp
    t.global_batch_size = t.global_batch_size or step
    if t.global_batch_size % step:
        raise ConfigError(
            f"global_batch_size {t.global_batch_size} is not a multiple of micro_batch_size "
            f"{t.micro_batch_size} "
            f"x data-parallel size {dp}; change one of them"
        )
    if t.train_iters is None and t.train_samples is None:
        raise ConfigError("the run has no length; give --train-iters or --train-samples")
    if t.train_iters is not None and t.train_samples is not None:
        raise ConfigError("train_iters and train_samples are both given; drop one of them")
    if not (t.train_iters or t.train_samples):
        raise ConfigError(
            "the run is 0 long; give --train-iters or --train-samples a positive number"
        )
    if t.ema_decay is not None and not 0 < t.ema_decay < 1:
        raise ConfigError(
            f"ema_decay is {t.ema_decay}; give --ema-decay a number between 0 and 1, e.g. 0.999"
        )
    sizes = [t.global_batch_size]
    if t.rampup_batch_size is not None:
        if t.train_iters is not None:
            raise ConfigError(
                "rampup_batch_size needs the run's length in samples; give --train-samples "
                "instead of --train-iters"
            )
        if len(t.rampup_batch_size) != 3:
            raise ConfigError(
                f"rampup_batch_size has {len(t.rampup_batch_size)} numbers; write "
                f"--rampup-batch-size START INCREMENT SAMPLES"
            )
        start, increment, samples = t.rampup_batch_size
        if (
            start < 1
            or increment < 1
            or samples < 1
            or start >= t.global_batch_size
            or (t.global_batch_size - start) % increment
        ):
            raise ConfigError(
                f"rampup_batch_size {start} {increment} {samples} does not lead to "
                f"global_batch_size {t.global_batch_size}; START "
                "must be smaller and the difference a multiple of INCREMENT"
            )
        for name, value in (("START", start), ("INCREMENT", increment)):
            if value % step:
                raise ConfigError(
                    f"rampup_batch_size {name} {value} is not a multiple of "
                    f"micro_batch_size {t.micro_batch_size} "
                    f"x data-parallel size {dp}; change one of them"
                )
        sizes = [start, t.global_batch_size]
    if virtual_pipeline_size(p, config.model.num_layers) > 1:
        for size in sizes:
            if (size // step) % p.pipeline_model_parallel_size:
                raise ConfigError(
                    f"global_batch_size {size} makes {size // step} micro-batches a rank, "
                    f"not a multiple of pipeline_model_parallel_size "
                    f"{p.pipeline_model_parallel_size}, which the interleaved schedule "
                    f"needs; change --global-batch-size or --micro-batch-size"
                )
    for name in (
        "save_interval", "save_retain_interval", "most_recent_k", "eval_interval", "log_interval", "tensorboard_log_interval", "exit_interval",
        "exit_duration_in_mins", "check_weight_hash_across_dp_replicas_interval",
    ):  # fmt: skip
        section = next(
            s for s in (config.checkpoint, config.validation, config.logging, t) if hasattr(s, name)
        )
        if getattr(section, name) is not None and getattr(section, name) < 1:
            raise ConfigError(
                f"{name} is {getattr(section, name)}; give {_flag(name)} a positive number "
                f"or leave it out"
            )


def _check_optimizer(config: Config) -> None:
    o = config.optimizer
    if o.optimizer == "sgd" and config.parallel.use_distributed_optimizer:
        raise ConfigError(
            "optimizer sgd does not go with use_distributed_optimizer: megatron-core shards and "
            "saves the state of adam only; drop --use-distributed-optimizer or write "
            "--optimizer adam"
        )
    if o.lr is None:
        raise ConfigError("lr is missing; give --lr, e.g. --lr 1e-4")
    if o.min_lr > o.lr:
        raise ConfigError(f"min_lr {o.min_lr} is larger than lr {o.lr}; lower --min-lr")
    if o.lr_warmup_init > o.lr:
        raise ConfigError(
            f"lr_warmup_init {o.lr_warmup_init} is larger than lr {o.lr}; lower --lr-warmup-init"
        )
    for a, b in (
        ("lr_decay_iters", "lr_decay_samples"),
        ("lr_warmup_iters", "lr_warmup_samples"),
        ("lr_warmup_fraction", "lr_warmup_iters"),
        # fmt: skip
        ("lr_warmup_fraction", "lr_warmup_samples"),
        ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ):
        if getattr(o, a) and getattr(o, b):
            raise ConfigError(f"{a} and {b} are both given; drop one of them")
    if o.weight_decay_incr_style != "constant":
        if o.start_weight_decay is None or o.end_weight_decay is None:
            raise ConfigError(
                f"weight_decay_incr_style {o.weight_decay_incr_style} needs "
                f"start_weight_decay and end_weight_decay; give both"
            )
        if o.start_weight_decay > o.end_weight_decay:
            raise ConfigError(
                f"start_weight_decay {o.start_weight_decay} is larger than end_weight_decay "
                f"{o.end_weight_decay}; swap them"
            )
    elif o.start_weight_decay is not None or o.end_weight_decay is not None:
        raise ConfigError(
            "start_weight_decay and end_weight_decay have no effect with "
            "weight_decay_incr_style constant; give --weight-decay instead"
        )
    if o.override_opt_param_scheduler and o.use_checkpoint_opt_param_scheduler:
        raise ConfigError(
            "override_opt_param_scheduler and use_checkpoint_opt_param_scheduler contradict "
            "each other; drop one of them"
        )
    schedule = Schedule.of(config)
    if schedule.warmup >= schedule.decay:
        raise ConfigError(
            f"the warm-up of {schedule.warmup} samples is not shorter than the decay of "
            f"{schedule.decay}; "
            "lower --lr-warmup-iters, -samples or -fraction"
        )
    if o.lr_decay_style == "WSD":
        if schedule.wsd is None:
            raise ConfigError(
                "lr_decay_style WSD needs the length of its last phase; give "
                "--lr-wsd-decay-iters or --lr-wsd-decay-samples"
            )
        if schedule.wsd > schedule.decay - schedule.warmup:
            raise ConfigError(
                f"the last phase of WSD ({schedule.wsd} samples) is longer than what the "
                f"warm-up leaves "
                f"({schedule.decay - schedule.warmup}); shorten it"
            )


def total_samples(config: Config) -> int:
    """Length of the run in samples: whole iterations. Raises ConfigError beyond 2^53 samples."""
    t = config.training
    samples = t.train_samples
    if samples is None:
        samples = t.train_iters * t.global_batch_size
    if samples > _MOST_SAMPLES:
        name = "train_iters" if t.train_samples is None else "train_samples"
        raise ConfigError(
            f"{name}: a run of {samples:.4g} samples is longer than 2^53; "
            f"give --{name.replace('_', '-')} a smaller number"
        )
    return samples


def padded_vocab_size(config: Config, vocab_size: int) -> int:
    """The vocabulary padded to a multiple of make_vocab_size_divisible_by and the tensor-parallel
    size.
    """
    return pad_vocab_size(
        vocab_size,
        config.model.make_vocab_size_divisible_by,
        config.parallel.tensor_model_parallel_size,
    )


def pad_vocab_size(
    vocab_size: int, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int
) -> int:
    """A vocabulary's size padded to a multiple of both numbers."""
    multiple = math.lcm(make_vocab_size_divisible_by, tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Lengths of the learning-rate schedule in samples, as megatron-core's OptimizerParamScheduler
    wants them.
    """

    warmup: int
    decay: int
    wsd: int | None
    total: int

    @classmethod
    def of(cls, config: Config) -> Schedule:
        """Megatron's rules: iterations count as iterations x global_batch_size; the decay spans the
        run unless told otherwise.
        """
        o: OptimizerSettings = config.optimizer
        batch, total = config.training.global_batch_size, total_samples(config)
        decay = o.lr_decay_samples or (o.lr_decay_iters or 0) * batch or total
        warmup = o.lr_warmup_samples or o.lr_warmup_iters * batch
        if o.lr_warmup_fraction is not None:
            if not 0 <= o.lr_warmup_fraction < 1:
                raise ConfigError(
                    f"lr_warmup_fraction is {o.lr_warmup_fraction}; give a number from 0 up "
                    f"to, not including, 1"
                )
            warmup = int(o.lr_warmup_fraction * decay)
        wsd = o.lr_wsd_decay_samples or (o.lr_wsd_decay_iters or 0) * batch or None
        return cls(warmup, decay, wsd, total)
