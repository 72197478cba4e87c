"""What a model is evaluated on: the held-out parts of its corpora, or raw documents. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.config import Config
from megatron_chatflow.data.blend.document_dataset import DocumentDataset
from megatron_chatflow.data.preprocess.records import read_texts
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.evaluation.eval_model import Subject
from megatron_chatflow.tokenizer import TokenBytes, Tokenizer
from megatron_chatflow.training.data_setup import open_inputs, open_tokenizer
from megatron_chatflow.utils.user_files import check_line, check_name


@dataclass(frozen=True)
class Material:
    """Held-out text as one model reads it."""

    tokenizer: Tokenizer | None
    vocab_size: int
    """Before padding."""
    token_bytes: TokenBytes
    sources: Mapping[str, Any]
    """By name; each has `num_samples` and `read_window`."""
    domains: int
    """How many of them, the first ones, count for the loss over all."""
    notes: tuple[str, ...] = ()
    """Sentences that the user should see once."""


def corpora(config: Config) -> Material:
    """The validation parts of the curriculum's domains, and its named validation sets."""
    inputs = open_inputs(config, held_out=True)
    return Material(
        inputs.tokenizer,
        inputs.vocab_size,
        inputs.token_bytes,
        inputs.held_out,
        len(inputs.domains),
    )


def same_corpora(material: Material, config: Config) -> Material:
    """The corpora of another model as a reference reads them. Raises ConfigError where its
    tokenizer is another one.
    """
    if config.tokenizer.tokenizer_type is None:
        return material
    tokenizer, vocab_size = open_tokenizer(config)
    if (
        material.tokenizer is not None
        and tokenizer.fingerprint() != material.tokenizer.fingerprint()
    ):
        raise ConfigError(
            f"its tokenizer {tokenizer.name} did not make the corpora, "
            f"{material.tokenizer.name} did; compare the two on raw text, which each "
            "encodes for itself: --text NAME=FILE"
        )
    return Material(
        tokenizer,
        vocab_size,
        TokenBytes.of(tokenizer, vocab_size),
        material.sources,
        material.domains,
    )


def read_named_texts(words: Sequence[str]) -> dict[str, list[str]]:
    """{name: documents} of ``NAME=FILE`` words. Raises ConfigError or ValueError for a word or a
    file that cannot be used.
    """
    texts: dict[str, list[str]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ConfigError(
                f"text {word!r} does not say what it is called; write --text NAME=FILE, "
                f"e.g. --text zh=held_out.jsonl"
            )
        check_name("text", name)
        check_line(f"text {name}", path)
        if name in texts:
            raise ConfigError(f"text {name} is given twice; give each file a name of its own")
        try:
            texts[name] = list(read_texts([path]))
        except ChatflowError as error:
            raise ConfigError(f"text {name}: {str(error).removeprefix('--input ')}") from None
        if not texts[name]:
            raise ConfigError(f"text {word}: the file holds no text; give one with documents")
    return texts


def raw_text(
    subject: Subject, texts: Mapping[str, list[str]], document_start: str | None
) -> Material:
    """Raw documents as the model's tokenizer encodes them.

    Args:
        subject: the model.
        texts: documents by name.
        document_start: "bos", "eod" or None: the end-of-document token, after which documents begin
        in training here; of a model that was only
            converted the begin token, where its tokenizer has one.
    """
    tokenizer, vocab_size = open_tokenizer(subject.config)
    start, spelled = start_token(
        tokenizer, document_start or ("eod" if subject.trained else "bos or eod")
    )
    seq_length = subject.config.data.seq_length
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
    return Material(
        tokenizer,
        vocab_size,
        TokenBytes.of(tokenizer, vocab_size),
        sources,
        len(sources),
        tuple(notes),
    )


def start_token(tokenizer: Tokenizer, wanted: str) -> tuple[int, str]:
    """(id, what it is called) of the token that documents begin after. Raises ConfigError for "bos"
    where there is none.
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
