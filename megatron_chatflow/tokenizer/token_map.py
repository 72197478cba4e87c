"""What each new token was made of in the old tokenizer, for whoever makes its row of the
embedding.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from megatron_chatflow.tokenizer.vocabulary_base import NewToken, Vocabulary

VERSION = 1


def token_map(
    kind: str, base: Vocabulary, vocab_size: int, new: Sequence[NewToken]
) -> dict[str, Any]:
    """Returns the content of `token_map.json`.

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
    """Characters of each piece; unknown tokens, which have no text, share what the others leave."""
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
    """The part of a character that each byte is; one whose character begins before the text is
    taken for a third.
    """
    result: list[float] = []
    width = 3
    for byte in text:
        if byte & 0xC0 != 0x80:
            width = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
        result.append(1 / width)
    return result
