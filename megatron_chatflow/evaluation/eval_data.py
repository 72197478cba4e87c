"""The text of an evaluation: the held-out parts of corpora, or raw documents. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.config import Config
from megatron_chatflow.data.blend.document_dataset import DocumentDataset
from megatron_chatflow.data.preprocess.records import read_texts
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.evaluation.eval_model import EvalModel
from megatron_chatflow.tokenizer import TokenBytes, Tokenizer
from megatron_chatflow.training.data_setup import open_inputs, open_tokenizer
from megatron_chatflow.utils.user_files import check_line, check_name


@dataclass(frozen=True)
class EvalData:
    """Held-out text as one model reads it."""

    tokenizer: Tokenizer | None
    vocab_size: int
    """Before padding."""
    token_bytes: TokenBytes
    sources: Mapping[str, Any]
    """By name; each has `num_samples` and `read_window`."""
    num_domains: int
    """How many of the sources, from the first, count for the loss over all."""
    notes: tuple[str, ...] = ()
    """Messages that the user should see once."""


def open_corpora(config: Config) -> EvalData:
    """Open the validation parts of the curriculum's domains, and its named validation sets."""
    inputs = open_inputs(config, held_out=True)
    return EvalData(
        inputs.tokenizer,
        inputs.vocab_size,
        inputs.token_bytes,
        inputs.held_out,
        len(inputs.domains),
    )


def open_same_corpora(data: EvalData, config: Config) -> EvalData:
    """Return the corpora `data` as a reference model reads them.

    Raises:
        ConfigError: The reference has another tokenizer.
    """
    if config.tokenizer.tokenizer_type is None:
        return data
    tokenizer, vocab_size = open_tokenizer(config)
    if data.tokenizer is not None and tokenizer.fingerprint() != data.tokenizer.fingerprint():
        raise ConfigError(
            f"its tokenizer {tokenizer.name} did not make the corpora, "
            f"{data.tokenizer.name} did; compare the two on raw text, which each "
            "encodes for itself: --text NAME=FILE"
        )
    return EvalData(
        tokenizer,
        vocab_size,
        TokenBytes.of(tokenizer, vocab_size),
        data.sources,
        data.num_domains,
    )


def read_named_texts(files: Mapping[str, str | Path]) -> dict[str, list[str]]:
    """Return {name: documents} of {name: file}.

    Raises:
        ConfigError: A name or a file cannot be used.
    """
    texts: dict[str, list[str]] = {}
    for name, path in files.items():
        check_name("text", name)
        check_line(f"text {name}", str(path))
        try:
            texts[name] = list(read_texts([str(path)]))
        except ChatflowError as error:
            raise ConfigError(f"text {name}: {str(error).removeprefix('--input ')}") from None
        if not texts[name]:
            raise ConfigError(
                f"text {name}={path}: the file holds no text; give one with documents"
            )
    return texts


def open_raw_texts(
    model: EvalModel, texts: Mapping[str, list[str]], document_start: str | None
) -> EvalData:
    """Return raw documents as the model's tokenizer encodes them.

    Args:
        model: The model.
        texts: Documents by name.
        document_start: The token that documents begin after: "bos" or "eod". None is the
            end-of-document token, as in training; of a model that was only converted the begin
            token, where its tokenizer has one.
    """
    tokenizer, vocab_size = open_tokenizer(model.config)
    start, spelled = start_token(
        tokenizer, document_start or ("eod" if model.trained else "bos or eod")
    )
    seq_length = model.config.data.seq_length
    sources = {
        name: DocumentDataset(documents, tokenizer, start=start, seq_length=seq_length)
        for name, documents in texts.items()
    }
    notes = [
        f"documents begin after the {spelled} token ({start}), in windows of {seq_length} tokens"
    ]
    notes += [
        f"{name}: {source.num_changed:,} of {source.num_documents:,} documents are changed "
        f"by {tokenizer.name} (characters that it normalises or "
        "does not know); bits per byte are over the text as given"
        for name, source in sources.items()
        if source.num_changed
    ]
    return EvalData(
        tokenizer,
        vocab_size,
        TokenBytes.of(tokenizer, vocab_size),
        sources,
        len(sources),
        tuple(notes),
    )


def start_token(tokenizer: Tokenizer, wanted: str) -> tuple[int, str]:
    """Return (id, what it is called) of the token that documents begin after.

    Raises:
        ConfigError: `wanted` is "bos", and the tokenizer has no begin token.
    """
    if wanted == "bos" and tokenizer.bos is None:
        raise ConfigError(
            f"document_start bos: {tokenizer.name} has no begin token; write --document-start eod"
        )
    return (
        (tokenizer.eod, "end-of-document")
        if wanted == "eod" or tokenizer.bos is None
        else (tokenizer.bos, "begin")
    )
