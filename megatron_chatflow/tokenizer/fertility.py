"""How well a tokenizer fits a language: how many tokens it takes for its text."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from megatron_chatflow.tokenizer.base import Tokenizer

_WORD = re.compile(r"\S+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Letters of scripts that put no spaces between words.

Thai, Lao, Burmese, Khmer, Japanese and Chinese.
"""

_THREADS = 2
_EXAMPLE = 40


@dataclasses.dataclass(frozen=True)
class Fertility:
    """What a tokenizer makes of documents.

    Attributes:
        tokens: tokens of all of them.
        tokens_per_word: words are separated by spaces; None for text without spaces between words.
        tokens_per_character: per Unicode character.
        bytes_per_token: UTF-8 bytes.
        round_trips: documents that decode to what they were.
    """

    tokens: int
    tokens_per_word: float | None
    tokens_per_character: float
    bytes_per_token: float
    round_trips: int


@dataclasses.dataclass(frozen=True)
class TokenizerComparison:
    """Two tokenizers on the same documents.

    Attributes:
        documents: how many.
        characters: Unicode characters in them.
        bytes: UTF-8 bytes in them.
        before: of the first tokenizer.
        after: of the second one.
        change: tokens after, compared with before, as a fraction: -0.4 is 40% fewer.
        unchanged_documents: documents that both encode to the same ids.
        examples: beginnings of documents, as the two spell them: `text`, `before`, `after`.
    """

    documents: int
    characters: int
    bytes: int
    before: Fertility
    after: Fertility
    change: float
    unchanged_documents: int
    examples: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dataclasses.asdict(self)


def compare(
    before: Tokenizer, after: Tokenizer, texts: Sequence[str], examples: int = 3
) -> TokenizerComparison:
    """Encode documents with two tokenizers and compare the results.

    Args:
        before: the first tokenizer.
        after: the second one.
        texts: documents, at least one character among them.
        examples: how many documents to spell out, evenly spread.
    """
    old, new = before.encode_batch(texts, _THREADS), after.encode_batch(texts, _THREADS)
    first, second = _fertility(before, texts, old), _fertility(after, texts, new)
    chosen = [texts[i * len(texts) // examples] for i in range(min(examples, len(texts)))]
    return TokenizerComparison(
        documents=len(texts),
        characters=sum(map(len, texts)),
        bytes=sum(len(text.encode()) for text in texts),
        before=first,
        after=second,
        change=second.tokens / first.tokens - 1,
        unchanged_documents=sum(a == b for a, b in zip(old, new, strict=True)),
        examples=[_example(before, after, " ".join(text.split())[:_EXAMPLE]) for text in chosen],
    )


def _fertility(
    tokenizer: Tokenizer, texts: Sequence[str], encoded: Sequence[Sequence[int]]
) -> Fertility:
    tokens = sum(map(len, encoded))
    characters = sum(map(len, texts))
    words = sum(len(_WORD.findall(text)) for text in texts)
    unspaced = sum(len(_UNSPACED.findall(text)) for text in texts) * 4 >= characters
    return Fertility(
        tokens=tokens,
        tokens_per_word=None if unspaced else tokens / words,
        tokens_per_character=tokens / characters,
        bytes_per_token=sum(len(text.encode()) for text in texts) / tokens,
        round_trips=sum(
            tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True)
        ),
    )


def _example(before: Tokenizer, after: Tokenizer, text: str) -> dict[str, Any]:
    return {"text": text, "before": _spelled(before, text), "after": _spelled(after, text)}


def _spelled(tokenizer: Tokenizer, text: str) -> str:
    """Return the text with a bar between tokens.

    A character that is spelled in several tokens has their number after it.
    """
    ids = tokenizer.encode(text)
    pieces: list[str] = []
    start = length = 0
    for stop in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:stop])
        if not so_far.endswith("\ufffd"):
            pieces.append(so_far[length:] + (f"({stop - start})" if stop - start > 1 else ""))
            start, length = stop, len(so_far)
    return "|".join(pieces)
