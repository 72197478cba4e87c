"""Every setting of a run, as dataclasses: YAML and flags in, resolved YAML out."""

from megatron_chatflow.config.loader import load_values, make_parser, nearest, parse, to_yaml
from megatron_chatflow.config.schema import Config
from megatron_chatflow.config.validate import (
    Schedule,
    pad_vocab_size,
    padded_vocab_size,
    resolve,
    resolve_data,
    resolve_reading,
    total_samples,
)

__all__ = [
    "Config",
    "Schedule",
    "load_values",
    "make_parser",
    "nearest",
    "pad_vocab_size",
    "padded_vocab_size",
    "parse",
    "resolve",
    "resolve_data",
    "resolve_reading",
    "to_yaml",
    "total_samples",
]
