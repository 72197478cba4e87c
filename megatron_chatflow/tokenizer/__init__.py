"""Tokenizers under Megatron's names, each with exactly the ids of its library (see README.md)."""

from megatron_chatflow.tokenizer.base import TokenBytes, Tokenizer
from megatron_chatflow.tokenizer.factory import TOKENIZER_TYPES, load_tokenizer

__all__ = ["TOKENIZER_TYPES", "TokenBytes", "Tokenizer", "load_tokenizer"]
