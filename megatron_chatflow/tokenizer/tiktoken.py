"""Byte-pair vocabularies for the `tiktoken` library, in the JSON form that Megatron reads."""

import base64
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tiktoken

from megatron_chatflow.errors import ChatflowError, TokenizerError
from megatron_chatflow.tokenizer.base import Tokenizer, digest, neighbors, read_bytes
from megatron_chatflow.utils.user_files import load_json

# The settings that Megatron's TikTokenizer has by default.
_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n"
    r"\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_NUM_SPECIAL = 1000
_MAX_VOCAB = 1 << 17


class TiktokenTokenizer(Tokenizer):
    """A tiktoken vocabulary as Megatron's TikTokenizer reads it.

    Special tokens take the first ids, text tokens follow in the order of the file. The file is a
    JSON list of `{"rank", "token_bytes", ...}` (split by Megatron's pattern v2, 1000 special ids,
    `</s>` = 2 ends a document), or Mistral's `tekken.json`, which has its own pattern and number of
    special ids.

    Args:
        type: Megatron's name.
        path: the JSON file.
        vocab_size: special tokens included; when None, all that the file has, but at most 131072.

    Raises:
        TokenizerError: the file cannot be read, is of another kind, or has fewer tokens than
            `vocab_size`.
    """

    def __init__(self, type: str, path: str, vocab_size: int | None = None) -> None:
        content = read_bytes(type, "tokenizer_model", path)
        entries, config, special = _parse(type, path, content)
        self._num_special = config.get("default_num_special_tokens", _NUM_SPECIAL)
        size = vocab_size or min(
            config.get("default_vocab_size", _MAX_VOCAB), self._num_special + len(entries)
        )
        if not self._num_special + 256 <= size <= self._num_special + len(entries):
            raise TokenizerError(
                f"{type}: vocab_size {size} does not fit {path}, which has {len(entries)} "
                f"tokens in addition to {self._num_special} special ones: "
                f"give {self._num_special + 256} to {self._num_special + len(entries)}"
            )
        names = [special.get(i, f"<SPECIAL_{i}>") for i in range(self._num_special)]
        self._special = {name: i for i, name in enumerate(names)}
        ranks = {
            _token(type, path, i, entry): i + self._num_special
            for i, entry in enumerate(entries[: size - self._num_special])
        }
        self._lengths = [len(token) for token in ranks]
        if (
            len(ranks) != size - self._num_special
            or not {bytes([b]) for b in range(256)} <= ranks.keys()
        ):
            raise _not_a_vocabulary(type, path, "tokens are repeated or single bytes are missing")
        name = os.path.basename(path)
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=config.get("pattern", _PATTERN),
            mergeable_ranks=ranks,
            special_tokens=self._special,
        )
        eod, bos, pad = (self._special.get(token) for token in ("</s>", "<s>", "<pad>"))
        if eod is None:
            raise _not_a_vocabulary(type, path, "the special tokens lack </s>")
        super().__init__(
            type=type,
            name=name,
            vocab_size=size,
            eod=eod,
            bos=bos,
            pad=pad,
            fingerprint=digest("tiktoken", content, size, eod),
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`.

        Raises:
            TokenizerError: the library fails on it, as on white space of a million characters.
        """
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # no subclass of Exception
                raise
            raise TokenizerError(
                f"{self.type}: the library cannot split a text of {len(text):,} characters "
                f"that begins with "
                f"{text[:40]!r} ({error}): take it out, or shorten its white space"
            ) from None

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        return np.array([0] * self._num_special + self._lengths, np.int32)

    def control_id(self, spelling: str) -> int | None:
        """See `Tokenizer.control_id`."""
        return self._special.get(spelling)

    def joins(self, before: str, after: str) -> bool:
        """See `Tokenizer.joins`."""
        return before.encode()[-1:] + after.encode()[:1] in self._joined

    @cached_property
    def _joined(self) -> frozenset[bytes]:
        return neighbors(self._encoding.token_byte_values())

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


def _parse(
    type: str, path: str, content: bytes
) -> tuple[list[Any], dict[str, Any], dict[int, str]]:
    """Return the text tokens, the file's settings, and its special tokens by id."""
    try:
        parsed = load_json(content)
    except ChatflowError as error:
        raise _not_a_vocabulary(type, path, "it is not JSON") from error
    if isinstance(parsed, list):
        return parsed, {}, dict(enumerate(_SPECIAL))
    if (
        not isinstance(parsed, dict)
        or not isinstance(parsed.get("vocab"), list)
        or not isinstance(parsed.get("config"), dict)
    ):
        raise _not_a_vocabulary(
            type, path, "it is not a list of tokens and has no `vocab` and `config`"
        )
    special = {entry["rank"]: entry["token_str"] for entry in parsed.get("special_tokens") or ()}
    return parsed["vocab"], parsed["config"], special or dict(enumerate(_SPECIAL[:3]))


def _token(type: str, path: str, rank: int, entry: Any) -> bytes:
    try:
        if entry["rank"] == rank:
            return base64.b64decode(entry["token_bytes"], validate=True)
    except (KeyError, TypeError, ValueError):
        pass
    raise _not_a_vocabulary(
        type, path, f"entry {rank} has not the rank {rank} and token_bytes in base64"
    )


def _not_a_vocabulary(type: str, path: str, reason: str) -> TokenizerError:
    return TokenizerError(
        f"{type}: tokenizer_model {path} is not a tiktoken vocabulary in JSON ({reason}): "
        "give Megatron's list of rank and token_bytes or a tekken.json; for other "
        "vocabularies use HuggingFaceTokenizer and tokenizer.json"
    )
