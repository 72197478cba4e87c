"""The file token_map.json: what each new token was made of in the old tokenizer.

`make_token_map` writes it when a tokenizer is extended; conversion reads it to make the rows of the
embedding, and training to find which rows are new.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import ChatflowError, TokenizerError
from megatron_chatflow.tokenizer.vocabulary_base import NewToken, Vocabulary
from megatron_chatflow.utils.user_files import load_json, read_text

TOKEN_MAP = "token_map.json"
VERSION = 1
KINDS = ("extend", "replace")


@dataclass(frozen=True)
class MappedToken:
    """A new token and what its text was before it was a token."""

    id: int
    pieces: tuple[int, ...]
    """Ids of the base tokenizer."""
    chars: tuple[float, ...]
    """Characters in each piece; a byte piece counts its share of its character."""


@dataclass(frozen=True)
class TokenMap:
    """How a tokenizer was made from the one that the model was trained with."""

    kind: str
    """``extend``: the new ids follow the old ones. ``replace``: they take the place of old ones."""
    base_vocab_size: int
    vocab_size: int
    base_sha256: str
    new: tuple[MappedToken, ...]


def read_token_map(folder: Path) -> TokenMap:
    """Read and check the token map in a tokenizer's folder.

    Raises:
        TokenizerError: it is missing, of another version, damaged, or contradicts itself.
    """
    path = folder / TOKEN_MAP
    if not os.path.isfile(path):
        raise TokenizerError(
            f"{folder} has no {TOKEN_MAP}, so it is unknown where the rows of its tokens "
            f"come from; give a folder that tools/extend_tokenizer.py made"
        )
    try:
        content = load_json(read_text(path))
    except ChatflowError as error:
        raise TokenizerError(f"{path} cannot be read ({error}); make the tokenizer again") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} is not a JSON object; make the tokenizer again")
    if content.get("version") != VERSION or content.get("kind") not in KINDS:
        raise TokenizerError(
            f"{path}: version {content.get('version')!r}, kind {content.get('kind')!r}; "
            f"make the tokenizer with this release's tools"
        )
    try:
        new = tuple(
            MappedToken(int(e["id"]), tuple(map(int, e["pieces"])), tuple(map(float, e["chars"])))
            for e in content["new"]
        )
        result = TokenMap(
            content["kind"],
            int(content["base_vocab_size"]),
            int(content["vocab_size"]),
            str(content["base_sha256"]),
            new,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path} is damaged ({error!r}); make the tokenizer again") from None
    contradiction = _contradiction(result)
    if contradiction:
        raise TokenizerError(
            f"{path} contradicts itself: {contradiction}; make the tokenizer again"
        )
    return result


def _contradiction(token_map: TokenMap) -> str | None:
    ids = [token.id for token in token_map.new]
    base, size = token_map.base_vocab_size, token_map.vocab_size
    if token_map.kind == "extend" and sorted(ids) != list(range(base, size)):
        return f"the new ids are not {base} to {size - 1}"
    if token_map.kind == "replace" and (size != base or len(set(ids)) != len(ids)):
        return "a replacement leaves the size unchanged and names every id once"
    for token in token_map.new:
        counts = len(token.pieces), len(token.chars)
        if not 0 <= token.id < size or not token.pieces or counts[0] != counts[1]:
            return (
                f"token {token.id} has {counts[0]} pieces and {counts[1]} lengths in a "
                f"vocabulary of {size}"
            )
        if not all(0 <= piece < base for piece in token.pieces):
            return f"token {token.id} has pieces outside the base vocabulary of {base}"
    return None


def make_token_map(
    kind: str, base: Vocabulary, vocab_size: int, new: Sequence[NewToken]
) -> dict[str, Any]:
    """Return the content of `token_map.json`.

    Each new token has the ids that the base tokenizer splits its text into, and of each of these
    the length in characters. A piece that holds bytes of a character counts its share of them: 1/3
    for one of three bytes.

    Args:
        kind: `extend` or `replace`.
        base: the vocabulary before.
        vocab_size: number of ids after.
        new: the new tokens.
    """
    splits = base.tokens_of([token.text for token in new])
    entries = [
        {
            "id": token.id,
            "pieces": pieces,
            "chars": _shares(token.text, [base.text[i] for i in pieces]),
        }
        for token, pieces in zip(new, splits, strict=True)
    ]
    digest = hashlib.sha256(base.content).hexdigest()
    return {
        "version": VERSION,
        "kind": kind,
        "base_vocab_size": base.size,
        "vocab_size": vocab_size,
        "base_sha256": digest,
        "new": entries,
    }


def _shares(text: bytes, pieces: Sequence[bytes]) -> list[float]:
    """Return the characters of each piece.

    Unknown tokens, which have no text, share what the others leave.
    """
    share = _share_of_each_byte(text)
    unknown = sum(not piece for piece in pieces)
    left = len(text) - sum(map(len, pieces))
    if unknown:
        known = sum(len(piece.decode(errors="ignore")) for piece in pieces)
        return [
            float(len(piece.decode(errors="ignore")))
            if piece
            else (len(text.decode()) - known) / unknown
            for piece in pieces
        ]
    assert left == 0, (text, pieces)
    result, at = [], 0
    for piece in pieces:
        result.append(round(sum(share[at : at + len(piece)]), 6))
        at += len(piece)
    return result


def _share_of_each_byte(text: bytes) -> list[float]:
    """Return the part of a character that each byte is.

    A byte whose character begins before the text counts as a third.
    """
    result: list[float] = []
    width = 3
    for byte in text:
        if byte & 0xC0 != 0x80:
            width = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
        result.append(1 / width)
    return result
