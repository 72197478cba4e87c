"""Which settings each command reads, and which of them `--help` shows.

A flag that a command does not read is an error. A value of the `--config` file that a command does
not read has no effect: the file describes a run, and one file serves every command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from megatron_chatflow.config.schema import (
    Config,
    DataSettings,
    ModelSettings,
    PrecisionSettings,
    TokenizerSettings,
)


def _names(*sections: type) -> set[str]:
    return {field.name for section in sections for field in dataclasses.fields(section)}


def _split(text: str) -> set[str]:
    return set(text.split())


_ALL = {name for section in vars(Config()).values() for name in _names(type(section))}
_LENGTH = _split("micro_batch_size global_batch_size rampup_batch_size train_iters train_samples")
_BLEND = _names(DataSettings, TokenizerSettings) - {"amend_curriculum"} | _LENGTH | {"seed"}
_LAYOUT = _split(
    "tensor_model_parallel_size pipeline_model_parallel_size decoder_first_pipeline_num_layers "
    "decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split "
    "account_for_loss_in_pipeline_split pipeline_model_parallel_layout distributed_backend "
    "distributed_timeout_minutes init_timeout"
)
_WEIGHTS = (
    _names(ModelSettings, TokenizerSettings)
    | _LAYOUT
    | _split("load ckpt_step bf16 seed micro_batch_size seq_length curriculum")
)

READS: dict[str, set[str]] = {
    "train": _ALL,
    "preflight": _ALL,
    "submit": _ALL,
    "plan": _BLEND
    | _split(
        "amend_curriculum load save ckpt_step branch_from finetune exit_on_missing_checkpoint "
        "train_new_rows_samples"
    ),
    "locate": _BLEND,
    "propose": _BLEND,
    "evaluate": _WEIGHTS
    | _names(PrecisionSettings)
    | _split(
        "sequence_parallel global_batch_size data_path split reset_position_ids "
        "reset_attention_mask eod_mask_loss eval_iters use_cpu_initialization"
    ),
    "generate": _WEIGHTS,
    "doctor": _names(ModelSettings, PrecisionSettings)
    | _split(
        "curriculum data_path seq_length vocab_size save no_save_optim optimizer bf16 ema_decay "
        "init_timeout"
    ),
}
"""{command: names of the settings that it reads}."""

_COMMON_TRAIN = """
    curriculum data_path seq_length split amend_curriculum tokenizer_type tokenizer_model
    num_layers hidden_size num_attention_heads tensor_model_parallel_size
    pipeline_model_parallel_size sequence_parallel use_distributed_optimizer micro_batch_size
    global_batch_size train_iters train_samples seed bf16 fp8_format
    fp8_recipe lr min_lr lr_decay_style lr_warmup_iters weight_decay save load save_interval
    async_save finetune eval_interval eval_iters log_interval"""
_COMMON: dict[str, str] = {
    "train": _COMMON_TRAIN,
    "preflight": """num_layers hidden_size num_attention_heads tensor_model_parallel_size
        pipeline_model_parallel_size sequence_parallel use_distributed_optimizer micro_batch_size
        global_batch_size train_iters train_samples bf16 recompute_granularity fp8_format fp8_recipe
        save curriculum seq_length vocab_size""",
    "submit": """tensor_model_parallel_size pipeline_model_parallel_size micro_batch_size
        global_batch_size train_iters train_samples exit_duration_in_mins lr save load
        save_interval finetune curriculum amend_curriculum""",
    "plan": """curriculum data_path seq_length split amend_curriculum tokenizer_type
        tokenizer_model vocab_size micro_batch_size global_batch_size train_iters train_samples
        load ckpt_step""",
    "locate": """curriculum data_path seq_length split tokenizer_type tokenizer_model
        micro_batch_size global_batch_size train_iters train_samples seed""",
    "propose": "curriculum seq_length global_batch_size train_iters train_samples",
    "evaluate": """load ckpt_step curriculum data_path seq_length split eval_iters micro_batch_size
        global_batch_size bf16 tensor_model_parallel_size pipeline_model_parallel_size
        tokenizer_type tokenizer_model""",
    "generate": """load ckpt_step micro_batch_size seed bf16 tensor_model_parallel_size
        pipeline_model_parallel_size max_position_embeddings tokenizer_type tokenizer_model""",
    "doctor": "curriculum data_path save vocab_size init_timeout",
}
"""{command: the settings that its `--help` shows}; the rest is in `--help-all`."""


def settings_of(command: str | None) -> set[str]:
    """Return the settings that a command reads; all of them where it is None."""
    return READS[command] if command else _ALL


def common_settings_of(command: str | None) -> set[str]:
    """Return the settings that the command's `--help` shows."""
    return _split(_COMMON[command]) if command else _ALL


def readers_of(name: str) -> Iterable[str]:
    """Return the commands that read a setting."""
    return [command for command, names in READS.items() if name in names]
