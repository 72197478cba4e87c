"""The interface that all tokenizers share."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, AnyStr

import numpy as np

from megatron_chatflow.errors import TokenizerError
from megatron_chatflow.tokenizer.unicode_scripts import SPACE

BYTE_SPACE = tuple(f"<0x{byte:02X}>" for byte in SPACE.encode())
"""The byte pieces that stand for a space in a vocabulary without `SPACE`."""


class Tokenizer(abc.ABC):
    """Text to token ids and back, exactly as the library underneath does it.

    Text is data: a control token spelled inside it (`</s>`, `<|endoftext|>`) is encoded as the
    characters it is made of. Callers that want a control token add its id (`eod`, `bos`,
    `control_id`).

    Attributes:
        type: Megatron's name of the kind of tokenizer, as given to `load_tokenizer`.
        name: base name of the file or folder it was read from.
        vocab_size: number of ids; every id is in [0, vocab_size).
        eod: id of the end-of-document token.
        bos: id of the begin-of-sequence token, or None.
        pad: id of the padding token, or None.
        chat_template: Jinja text of the tokenizer's chat template, or None.
    """

    chat_template: str | None = None

    def __init__(
        self,
        *,
        type: str,
        name: str,
        vocab_size: int,
        eod: int,
        bos: int | None,
        pad: int | None,
        fingerprint: str,
    ) -> None:
        self.type = type
        self.name = name
        self.vocab_size = vocab_size
        self.eod = eod
        self.bos = bos
        self.pad = pad
        self._fingerprint = fingerprint

    def __repr__(self) -> str:
        return (
            f"{self.type}({self.name!r}, vocab_size={self.vocab_size}, eod={self.eod}, "
            f"bos={self.bos}, pad={self.pad})"
        )

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; no begin or end token is added."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Return `encode` of each text, computed on `num_threads` threads of the library."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of text of each token.

        The sum over `encode(text)` is `len(text.encode())`, except for what the tokenizer itself
        changes: a space it puts before the text, characters it normalizes or does not know. Where
        `byte_space` has ids, these three in a row count 1, not 3.

        Returns:
            int32[vocab_size]; 0 for control tokens.
        """

    def byte_space(self) -> tuple[int, int, int] | None:
        """Return the ids of the byte pieces that a space is written with.

        None where the vocabulary has a piece for it.
        """
        return None

    @abc.abstractmethod
    def control_id(self, spelling: str) -> int | None:
        """Return the id of a control token (such as `<|im_start|>`), or None when there is none."""

    def control_tokens(self) -> Mapping[str, int]:
        """Return the ids of the control tokens that a chat template may spell.

        Empty unless the tokenizer declares them as such.
        """
        return {}

    def joins(self, before: str, after: str) -> bool:
        """Return whether a token may reach from one character into the next one.

        Where it is False, and the pre-tokenizer agrees, texts can be encoded in two pieces
        (`long_text.py`). A tokenizer for which that is not known returns True.
        """
        return True

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, all of which are in the vocabulary."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`.

        Ids beyond the vocabulary (a model's is padded) have no text and are left out.
        """
        return self._decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of what decides the ids.

        That is the library, the content of the files, and the end-of-document id.
        """
        return self._fingerprint

    def identity(self) -> dict[str, Any]:
        """Return the entry of a corpus's manifest for its tokenizer.

        The keys are `type`, `name`, `hash`, `vocab_size` and `eod`.
        """
        return {
            "type": self.type,
            "name": self.name,
            "hash": self.fingerprint(),
            "vocab_size": self.vocab_size,
            "eod": self.eod,
        }


@dataclass(frozen=True)
class TokenBytes:
    """UTF-8 bytes of text that the tokens of a model stand for."""

    table: np.ndarray
    """int64 [vocabulary], of each single token; zeros where no tokenizer is known."""
    byte_space: tuple[int, int, int] | None = None
    """Three ids that stand for a single byte where they follow each other."""

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, vocab_size: int) -> TokenBytes:
        """Return the bytes of a tokenizer's tokens for a model with `vocab_size` ids.

        The model has at least the ids of the tokenizer.
        """
        table = np.zeros(vocab_size, np.int64)
        if tokenizer is None:
            return cls(table)
        table[: tokenizer.vocab_size] = tokenizer.token_bytes()
        return cls(table, tokenizer.byte_space())


def neighbors(texts: Iterable[AnyStr]) -> frozenset[AnyStr]:
    """Return every two characters (bytes) that are neighbors in one of the texts."""
    return frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1))


def digest(library: str, *parts: bytes | int | None) -> str:
    """Return the sha256 (hex) of the library's name and of each part, with their lengths."""
    result = hashlib.sha256(library.encode())
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        result.update(len(content).to_bytes(8, "little"))
        result.update(content)
    return result.hexdigest()


def read_bytes(tokenizer_type: str, setting: str, path: str) -> bytes:
    """Read a tokenizer's file.

    Raises:
        TokenizerError: it cannot be read; the message names `setting`.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise TokenizerError(
            f"{tokenizer_type}: {setting} {path} cannot be read ({error.strerror}): give "
            f"the path of a file on this machine"
        ) from error
