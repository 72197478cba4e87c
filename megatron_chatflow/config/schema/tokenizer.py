"""The section ``tokenizer``: the tokenizer of the corpora."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_chatflow.config.schema.section import Section, path_field

TokenizerType = Literal[
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
]


@dataclass(frozen=True)
class TokenizerSettings(Section):
    """The tokenizer of the corpora."""

    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer; determines bits per byte, the end-of-document token and the size of the
    vocabulary.
    """
    tokenizer_model: str | None = path_field()
    """File (or folder, for HuggingFaceTokenizer) of the tokenizer."""
    vocab_file: str | None = path_field()
    """Vocabulary of GPT2BPETokenizer."""
    merge_file: str | None = path_field()
    """Merges of GPT2BPETokenizer."""
    vocab_size: int | None = None
    """Size of the vocabulary before padding; the tokenizer's by default, needed without one."""
