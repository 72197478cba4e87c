"""Every setting of a run, as dataclasses: YAML and flags in, resolved YAML out."""

from megatron_chatflow.config.arguments import CommandParser, nearest
from megatron_chatflow.config.derived import (
    Schedule,
    pad_vocab_size,
    padded_vocab_size,
    total_samples,
)
from megatron_chatflow.config.loader import load_values, make_config, make_parser, parse, to_yaml
from megatron_chatflow.config.schema import Config, DataConfig, ModelConfig, ResolvedConfig
from megatron_chatflow.config.validate import resolve, resolve_data, resolve_model

__all__ = [
    "CommandParser",
    "Config",
    "DataConfig",
    "ModelConfig",
    "ResolvedConfig",
    "Schedule",
    "load_values",
    "make_config",
    "make_parser",
    "nearest",
    "pad_vocab_size",
    "padded_vocab_size",
    "parse",
    "resolve",
    "resolve_data",
    "resolve_model",
    "to_yaml",
    "total_samples",
]
