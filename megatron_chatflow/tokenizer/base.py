"""What every tokenizer here can do."""

import abc
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


class Tokenizer(abc.ABC):
    """Text to token ids and back, exactly as the library underneath does it.

    Text is data: a control token spelled inside it (`</s>`, `<|endoftext|>`) is encoded as the characters it is made of. Whoever wants a
    control token adds its id (`eod`, `bos`, `control_id`).

    Attributes:
        type: Megatron's name of the kind of tokenizer, as given to `load_tokenizer`.
        name: base name of the file or folder it was read from.
        vocab_size: number of ids; every id lies in [0, vocab_size).
        eod: id of the end-of-document token.
        bos: id of the begin-of-sequence token, or None.
        pad: id of the padding token, or None.
        chat_template: Jinja text of the tokenizer's own chat template, or None.
    """

    chat_template: str | None = None

    def __init__(self, *, type: str, name: str, vocab_size: int, eod: int, bos: int | None, pad: int | None, fingerprint: str) -> None:
        self.type = type
        self.name = name
        self.vocab_size = vocab_size
        self.eod = eod
        self.bos = bos
        self.pad = pad
        self._fingerprint = fingerprint

    def __repr__(self) -> str:
        return f"{self.type}({self.name!r}, vocab_size={self.vocab_size}, eod={self.eod}, bos={self.bos}, pad={self.pad})"

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; no begin or end token is added."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Returns `encode` of each text, computed on `num_threads` of the library's own threads."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Returns how many UTF-8 bytes of text each token stands for.

        The sum over `encode(text)` is `len(text.encode())`, but for what the tokenizer itself changes: a space it puts before the text, characters it
        normalises or does not know.

        Returns:
            int32[vocab_size]; 0 for control tokens.
        """

    @abc.abstractmethod
    def control_id(self, spelling: str) -> int | None:
        """Returns the id of the control token spelled so (such as `<|im_start|>`), or None when the tokenizer has none."""

    def control_tokens(self) -> Mapping[str, int]:
        """Returns the ids of the control tokens that a chat template may spell; none unless the tokenizer declares them as such."""
        return {}

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`, all of which lie in the vocabulary."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; ids beyond the vocabulary (a model's is padded) stand for nothing and are left out."""
        return self._decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def fingerprint(self) -> str:
        """Returns the sha256 (hex) of what decides the ids: the library, the content of the files, the end-of-document id."""
        return self._fingerprint

    def identity(self) -> dict[str, Any]:
        """Returns what a corpus's manifest says of its tokenizer: `type`, `name`, `hash`, `vocab_size` and `eod`."""
        return {"type": self.type, "name": self.name, "hash": self.fingerprint(), "vocab_size": self.vocab_size, "eod": self.eod}


def digest(library: str, *parts: bytes | int | None) -> str:
    """Returns the sha256 (hex) of the library's name and of each part, told apart from its neighbours."""
    result = hashlib.sha256(library.encode())
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        result.update(len(content).to_bytes(8, "little"))
        result.update(content)
    return result.hexdigest()


def read_bytes(tokenizer_type: str, setting: str, path: str) -> bytes:
    """Reads a tokenizer's file whole.

    Raises:
        ValueError: it cannot be read; the sentence names `setting`.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{tokenizer_type}: {setting} {path} cannot be read ({error.strerror}): give the path of a file on this machine") from error
