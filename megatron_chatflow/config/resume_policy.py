"""What a change of each setting does when a run is resumed, and the values that are compared.

`AT_RESUME` is the only place that says so. `training/resume_settings.py` acts on it,
docs/training.md prints it (`resume_table`), and a test fails when a setting is in no class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from megatron_chatflow.config.derived import Schedule, total_samples
from megatron_chatflow.config.schema import Config, DataConfig, OptimizerSettings

_C = TypeVar("_C", bound=Config)


class AtResume(Enum):
    """What a change does; the value is the text of docs/training.md."""

    MODEL = "refused, with `--finetune` too: the weights belong to the checkpoint's model"
    POSITIONS = "refused; with `--finetune` in effect, and reported in one line"
    DATA = (
        "refused: samples would be read twice or have other tokens; `--finetune` starts a new run"
    )
    CURRICULUM = (
        "followed from the next sample on; another past is refused without `--amend-curriculum`"
    )
    KIND = "refused; in effect with `--no-load-optim`"
    SCHEDULE = (
        "refused; with `--override-opt_param-scheduler` this command's value is in effect from "
        "the first iteration, "
        "with `--use-checkpoint-opt_param-scheduler` the checkpoint's; both are reported"
    )
    REPORTED = "in effect from the first iteration, and reported in one line"
    LAYOUT = "in effect; the results agree to rounding, so it is not reported"
    CONTROL = "in effect; it concerns this command and not what is trained, so it is not reported"
    START = "no effect: only used for the weights that a new run starts with"


_FIELDS = {
    AtResume.MODEL: (
        "num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels "
        "group_query_attention num_query_groups max_position_embeddings "
        "position_embedding_type rotary_percent normalization norm_epsilon swiglu add_bias_linear "
        "add_qkv_bias qk_layernorm "
        "untie_embeddings_and_output_weights vocab_size"
    ),
    AtResume.POSITIONS: (
        "rotary_base use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor"
    ),
    AtResume.DATA: "seed seq_length split tokenizer_type tokenizer_model vocab_file merge_file",
    AtResume.CURRICULUM: "curriculum data_path",
    AtResume.KIND: "optimizer",
    AtResume.SCHEDULE: (
        "lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_iters "
        "lr_warmup_samples lr_warmup_fraction lr_warmup_init "
        "lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples weight_decay "
        "start_weight_decay end_weight_decay weight_decay_incr_style "
        "clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum"
    ),
    AtResume.REPORTED: (
        "attention_dropout hidden_dropout global_batch_size rampup_batch_size train_iters "
        "train_samples bf16 accumulate_allreduce_grads_in_fp32 "
        "check_for_nan_in_loss_and_grad iterations_to_skip train_new_rows_samples ema_decay "
        "fp8_format fp8_recipe fp8_margin fp8_amax_history_len "
        "fp8_amax_compute_algo fp8_param_gather tp_only_amax_red first_last_layers_bf16 "
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 "
        "reset_position_ids reset_attention_mask eod_mask_loss"
    ),
    AtResume.LAYOUT: (
        "make_vocab_size_divisible_by transformer_impl tensor_model_parallel_size "
        "pipeline_model_parallel_size decoder_first_pipeline_num_layers "
        "decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split pipeline_model_parallel_layout "
        "num_layers_per_virtual_pipeline_stage sequence_parallel use_distributed_optimizer "
        "overlap_grad_reduce ddp_bucket_size overlap_param_gather "
        "distributed_backend distributed_timeout_minutes init_timeout micro_batch_size "
        "recompute_granularity "
        "recompute_method recompute_num_layers "
        "recompute_modules"
    ),
    AtResume.CONTROL: (
        "max_nonfinite_iterations check_weight_hash_across_dp_replicas_interval "
        "exit_interval exit_duration_in_mins "
        "override_opt_param_scheduler use_checkpoint_opt_param_scheduler save load "
        "save_interval save_retain_interval most_recent_k async_save exit_on_failed_save "
        "ckpt_step branch_from finetune no_load_optim no_save_optim "
        "exit_on_missing_checkpoint amend_curriculum eval_interval eval_iters "
        "log_level log_interval log_throughput tensorboard_dir tensorboard_log_interval"
    ),
    AtResume.START: "init_method_std use_cpu_initialization",
}

WEIGHT_DECAY_LENGTH = "weight_decay_incr_samples"
"""Samples over which weight decay moves: the length of the run, so not a separate setting."""

BRANCH_MAY_CHANGE = frozenset(
    ["min_lr", "lr_decay_style", "lr_decay_samples", "lr_wsd_decay_style", "lr_wsd_decay_samples"]
) | {WEIGHT_DECAY_LENGTH}
"""Settings of the schedule that may differ where a branch begins (--branch-from): those of its end.
Once the branch has a checkpoint, it is resumed by the rules of any run."""

WARMUP = frozenset({"lr_warmup_samples", "lr_warmup_init"})
"""Settings of the warm-up; a branch that begins after it may change them too."""

AT_RESUME: dict[str, AtResume] = {
    name: kind for kind, names in _FIELDS.items() for name in names.split()
}
"""{setting: what a change of it does when a run is resumed}."""

COMPARED_AS = {
    "group_query_attention": "num_query_groups",
    "train_iters": "train_samples",
    "lr_decay_iters": "lr_decay_samples",
    "lr_warmup_iters": "lr_warmup_samples",
    "lr_warmup_fraction": "lr_warmup_samples",
    "lr_wsd_decay_iters": "lr_wsd_decay_samples",
}
"""{setting: the one that is compared in its place}: different settings may mean the same."""


def kind_of(name: str) -> AtResume:
    """Return the class of one of the names in `compared_settings`."""
    return AtResume.SCHEDULE if name == WEIGHT_DECAY_LENGTH else AT_RESUME[name]


def model_settings(config: Config, vocab_size: int | None) -> dict[str, Any]:
    """Return {setting: value} of the model that the weights belong to.

    Lengths and sizes that follow from others are filled in.

    Args:
        config: as written or resolved.
        vocab_size: tokens without padding; None where it is not known, and then it is not among the
            result.
    """
    m = config.model
    values = _fields(config, (AtResume.MODEL, AtResume.POSITIONS))
    values["num_query_groups"] = m.key_value_heads
    values["kv_channels"] = m.kv_channels or m.hidden_size // max(1, m.num_attention_heads)
    del values["vocab_size"]
    return values if vocab_size is None else values | {"vocab_size": vocab_size}


def training_settings(config: DataConfig, schedule: Schedule) -> dict[str, Any]:
    """Return {setting: value} of the optimizer, its schedule in samples, and all that is reported.

    `config` is resolved.
    """
    values = _fields(config, (AtResume.KIND, AtResume.SCHEDULE, AtResume.REPORTED))
    return values | {
        "train_samples": total_samples(config),
        "lr_warmup_samples": schedule.warmup,
        "lr_decay_samples": schedule.decay,
        "lr_wsd_decay_samples": schedule.wsd,
        WEIGHT_DECAY_LENGTH: schedule.total,
    }


def _fields(config: Config, kinds: tuple[AtResume, ...]) -> dict[str, Any]:
    sections = [getattr(config, section.name) for section in dataclasses.fields(config)]
    return {
        f.name: getattr(section, f.name)
        for section in sections
        for f in dataclasses.fields(section)
        if AT_RESUME[f.name] in kinds and f.name not in COMPARED_AS
    }


def without_effect(values: dict[str, Any]) -> set[str]:
    """Return the names in `values` whose value has no effect given the others.

    Examples are the momentum of SGD under Adam and the floor of a constant rate.
    """
    names: set[str] = set()
    if values.get("position_embedding_type") != "rope":
        names |= {
            "rotary_percent",
            "rotary_base",
            "use_rope_scaling",
            "rotary_seq_len_interpolation_factor",
        }
    if not values.get("use_rope_scaling"):
        names |= {"rope_scaling_factor"}
    if values.get("position_embedding_type") != "learned_absolute":
        names |= {"max_position_embeddings"}
    if values.get("add_bias_linear"):
        names |= {"add_qkv_bias"}
    names |= (
        {"sgd_momentum"}
        if values.get("optimizer") == "adam"
        else {"adam_beta1", "adam_beta2", "adam_eps"}
    )
    if values.get("lr_decay_style") == "constant":
        names |= {"min_lr", "lr_decay_samples"}
    if values.get("lr_decay_style") != "WSD":
        names |= {"lr_wsd_decay_style", "lr_wsd_decay_samples"}
    if not values.get("lr_warmup_samples"):
        names |= {"lr_warmup_init"}
    constant = values.get("weight_decay_incr_style") == "constant"
    names |= (
        {"start_weight_decay", "end_weight_decay", WEIGHT_DECAY_LENGTH}
        if constant
        else {"weight_decay"}
    )
    if values.get("fp8_format") is None:
        names |= {name for name in values if name.startswith("fp8_")} - {"fp8_format"}
    return names & set(values)


def with_schedule(config: _C, values: Mapping[str, Any]) -> _C:
    """Return `config` with the optimizer settings of another run.

    Args:
        config: as written or resolved.
        values: `training_settings` of the other run.
    """
    changes = {
        name: value
        for name, value in values.items()
        if name != WEIGHT_DECAY_LENGTH and AT_RESUME[name] == AtResume.SCHEDULE
    }
    for name, other in COMPARED_AS.items():
        if AT_RESUME[name] == AtResume.SCHEDULE and other in values:
            changes[name] = getattr(OptimizerSettings, name)  # the default
    return config.replace(**changes)


def resume_table() -> str:
    """The table of docs/training.md."""
    rows = [
        f"| {', '.join(f'`{name}`' for name in names.split())} | {kind.value} |"
        for kind, names in _FIELDS.items()
    ]
    return "\n".join(["| settings | a change at resume is |", "|---|---|", *rows])
