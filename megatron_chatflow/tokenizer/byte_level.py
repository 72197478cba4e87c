"""Tokenizers without a file: bytes, and text that is already numbers."""

from collections.abc import Sequence

import numpy as np

from megatron_chatflow.errors import TokenizerError
from megatron_chatflow.tokenizer.base import Tokenizer, digest


class ByteLevelTokenizer(Tokenizer):
    """The UTF-8 bytes of the text: ids 0 to 255, then end-of-document 256, begin 257, padding 258.

    Megatron's class of this name ends documents with the id 0, which is also the byte NUL; here no
    control token is a byte.
    """

    def __init__(self, type: str = "ByteLevelTokenizer") -> None:
        super().__init__(
            type=type,
            name="bytes",
            vocab_size=259,
            eod=256,
            bos=257,
            pad=258,
            fingerprint=digest("bytes", 256),
        )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return [self.encode(text) for text in texts]

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def control_id(self, spelling: str) -> int | None:
        """See `Tokenizer.control_id`."""
        return None

    def joins(self, before: str, after: str) -> bool:
        """See `Tokenizer.joins`."""
        return False

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class NullTokenizer(Tokenizer):
    """Text that is already numbers (`17 4 2023`), for experiments; the last id ends a document.

    Args:
        type: Megatron's name.
        vocab_size: numbers from 0 to `vocab_size - 1` are tokens; the end-of-document id is
            `vocab_size`.
    """

    def __init__(self, type: str, vocab_size: int) -> None:
        name, fingerprint = f"{vocab_size} numbers", digest("null", vocab_size)
        super().__init__(
            type=type,
            name=name,
            vocab_size=vocab_size + 1,
            eod=vocab_size,
            bos=None,
            pad=None,
            fingerprint=fingerprint,
        )

    def encode(self, text: str) -> list[int]:
        """Return the numbers in `text`.

        Raises:
            TokenizerError: something in it is not a number of the vocabulary.
        """
        result = []
        for word in text.split():
            if not (word.isascii() and word.isdigit() and int(word) < self.eod):
                raise TokenizerError(
                    f"{self.type}: {word!r} is not a number from 0 to {self.eod - 1}: the "
                    f"text must be made of such numbers"
                )
            result.append(int(word))
        return result

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return [self.encode(text) for text in texts]

    def token_bytes(self) -> np.ndarray:
        """Return the digits of each number and a space."""
        return np.array([len(str(i)) + 1 for i in range(self.eod)] + [0], np.int32)

    def control_id(self, spelling: str) -> int | None:
        """See `Tokenizer.control_id`."""
        return None

    def joins(self, before: str, after: str) -> bool:
        """See `Tokenizer.joins`."""
        return not (before.isspace() or after.isspace())

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))
