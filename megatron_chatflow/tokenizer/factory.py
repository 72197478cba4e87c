"""Tokenizers by Megatron's names."""

import os

from megatron_chatflow.errors import TokenizerError
from megatron_chatflow.tokenizer.base import Tokenizer
from megatron_chatflow.utils.user_files import closest

TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
)


def load_tokenizer(
    tokenizer_type: str,
    *,
    tokenizer_model: str | os.PathLike | None = None,
    vocab_file: str | os.PathLike | None = None,
    merge_file: str | os.PathLike | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """Load a tokenizer; only the library that it needs is imported.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`, spelled as in Megatron.
        tokenizer_model: the SentencePiece `.model`; the `tokenizer.json` or its folder
            (HuggingFaceTokenizer); the JSON vocabulary (TikTokenizer).
        vocab_file: `vocab.json` of GPT2BPETokenizer.
        merge_file: `merges.txt` of GPT2BPETokenizer.
        vocab_size: how many numbers NullTokenizer knows; where TikTokenizer cuts its vocabulary.
            The other kinds do not read it.

    Raises:
        TokenizerError: the type is unknown, a file it needs is not given, missing or of another
            kind; the message says what to do.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise TokenizerError(_unknown(tokenizer_type))

    def need(setting: str, value: str | os.PathLike | int | None) -> str:
        if value is None:
            raise TokenizerError(
                f"{tokenizer_type} needs {setting}: give --{setting.replace('_', '-')}"
            )
        return os.fspath(value) if isinstance(value, os.PathLike) else str(value)

    if tokenizer_type in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        from megatron_chatflow.tokenizer.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(tokenizer_type, need("tokenizer_model", tokenizer_model))
    if tokenizer_type == "HuggingFaceTokenizer":
        from megatron_chatflow.tokenizer.huggingface import load_tokenizer_json

        return load_tokenizer_json(tokenizer_type, need("tokenizer_model", tokenizer_model))
    if tokenizer_type == "GPT2BPETokenizer":
        from megatron_chatflow.tokenizer.huggingface import load_gpt2

        return load_gpt2(
            tokenizer_type, need("vocab_file", vocab_file), need("merge_file", merge_file)
        )
    if tokenizer_type == "TikTokenizer":
        from megatron_chatflow.tokenizer.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(
            tokenizer_type, need("tokenizer_model", tokenizer_model), vocab_size
        )
    from megatron_chatflow.tokenizer.byte_level import ByteLevelTokenizer, NullTokenizer

    if tokenizer_type == "ByteLevelTokenizer":
        return ByteLevelTokenizer(tokenizer_type)
    return NullTokenizer(tokenizer_type, int(need("vocab_size", vocab_size)))


def _unknown(tokenizer_type: str) -> str:
    by_lower = {name.lower(): name for name in TOKENIZER_TYPES}
    nearest = closest(str(tokenizer_type).lower(), by_lower, cutoff=0.5)
    hint = (
        f"did you mean {by_lower[nearest]}?"
        if nearest
        else f"known are {', '.join(TOKENIZER_TYPES)}"
    )
    return f"tokenizer_type {tokenizer_type!r} is unknown: {hint}"
