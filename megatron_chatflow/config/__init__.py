"""Every setting of a run, as dataclasses: YAML and flags in, resolved YAML out."""

from megatron_chatflow.config.derive import Schedule, pad_vocab_size, padded_vocab_size, resolve, resolve_data, resolve_reading, total_samples
from megatron_chatflow.config.parse import UsageError, load_values, make_parser, nearest, parse, to_yaml
from megatron_chatflow.config.settings import Config

__all__ = [
    "Config",
    "Schedule",
    "UsageError",
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
