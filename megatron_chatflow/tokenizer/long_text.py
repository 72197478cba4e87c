"""Encode long texts in pieces: libraries take 10 to 50 times the memory of a text.

Tokens must be those of the complete text, so a piece ends only at a seam: a place that no token of
the vocabulary reaches across (`Tokenizer.joins`), where in addition the text around it encodes to
the same tokens with and without the cut. A text without seams is encoded at once.
"""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_chatflow.tokenizer.base import Tokenizer

PIECE = 1 << 18
"""Characters of a piece, at least; a text of up to twice as many is encoded at once."""
_CONTEXT = 256
_COMPARED = 16
_TRIES = 32
_MISSES = 64
_MOST_CANDIDATES = 4096
_CANDIDATE = re.compile(r"(?<=\S)(?=\s)|(?<=[\n。！？；，、])(?=\S)")


@dataclass(frozen=True)
class _Seam:
    """Where a piece ends, and how the next one begins.

    Attributes:
        end: of the piece, in characters.
        start: of the next piece; `end`, or one more where the tokenizer itself puts a space first.
        drop: tokens that the tokenizer puts before the next piece and that are not in the text.
        before: the last tokens before the seam.
        after: the first tokens after it, dropped ones included.
    """

    end: int
    start: int
    drop: int
    before: list[int]
    after: list[int]


def encode_in_pieces(tokenizer: Tokenizer, text: str) -> array:
    """Return `tokenizer.encode(text)` as an array of int32, in memory of its size."""
    if len(text) <= 2 * PIECE:
        return array("i", tokenizer.encode(text))
    result = array("i")
    start, drop, first = 0, 0, []
    for seam in [*_seams(tokenizer, text), None]:
        ids = tokenizer.encode(text[start : seam.end if seam else len(text)])
        last = seam.before if seam else []
        if ids[: len(first)] != first or (last and ids[-len(last) :] != last):
            return array("i", tokenizer.encode(text))
        result.extend(ids[drop:])
        if seam:
            start, drop, first = seam.start, seam.drop, seam.after
    return result


def _seams(tokenizer: Tokenizer, text: str) -> Iterator[_Seam]:
    at = misses = 0
    while len(text) - at > 2 * PIECE:
        seam = _seam_after(tokenizer, text, at + PIECE)
        if seam is not None:
            yield seam
        else:
            misses += 1
            if misses == _MISSES:
                return
        at = seam.start if seam else at + PIECE


def _seam_after(tokenizer: Tokenizer, text: str, at: int) -> _Seam | None:
    """Return a seam within a piece from `at` on, or None."""
    tries = 0
    stop = min(at + PIECE, len(text) - _CONTEXT)
    for number, candidate in enumerate(_CANDIDATE.finditer(text, at, stop)):
        end = candidate.start()
        if number == _MOST_CANDIDATES or tries == _TRIES:
            break
        if not tokenizer.joins(text[end - 1], text[end]):
            tries += 1
            if (seam := _checked(tokenizer, text, end)) is not None:
                return seam
    return None


def _checked(tokenizer: Tokenizer, text: str, end: int) -> _Seam | None:
    """Return the seam at `end` if the text around it encodes to the same tokens across it."""
    left, right = text[end - _CONTEXT : end], text[end : end + _CONTEXT]
    expected = tokenizer.encode(left + right)
    before = tokenizer.encode(left)
    for skip, drop in ((0, 0), (1, 0), (0, 1)):
        if skip and not right[0].isspace():
            continue
        after = tokenizer.encode(right[skip:])
        if before + after[drop:] == expected:
            kept = slice(-_COMPARED, None)
            return _Seam(end, end + skip, drop, before[kept], after[:_COMPARED])
    return None
