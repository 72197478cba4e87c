"""Kinds of characters: a new token never joins two of them.

So it is a run of letters of one script, perhaps with the space before it.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

OTHER, BLANK, JOINER, WIDE = range(4)
"""Digits, symbols, Western punctuation and controls; the space; marks; East Asian punctuation.

Marks (JOINER) join whatever letter they follow.
"""

ZERO_WIDTH = "\u200c\u200d"
"""The zero-width non-joiner and joiner, used inside words of Indic scripts and of Arabic."""

_COMMON_MARKS = (
    (0x300, 0x370),
    (0x1AB0, 0x1B00),
    (0x1DC0, 0x1E00),
    (0xFE00, 0xFE10),
    (0xFE20, 0xFE30),
)
"""Combining marks and variation selectors of letters and signs of any script.

First code point, and one past the last.
"""
_LATIN_BLOCKS = (
    (0x2B0, 0x300),
    (0x1D00, 0x1DC0),
    (0xA700, 0xA800),
    (0xAB30, 0xAB70),
    (0x10780, 0x107C0),
)
"""Phonetic and modifier letters of text in Latin letters.

In addition to the letters whose names begin with LATIN.
"""
_COMMON = (
    (0x2000, 0x2C00),
    (0x2E00, 0x2E80),
    (0xFEFF, 0xFF00),
    (0xFFF0, 0x10000),
    (0x1D400, 0x1D800),
    (0x1F000, 0x1FC00),
)
"""Punctuation, symbols and emoji of text in any script."""
_FIRST_SCRIPT = WIDE + 1
_HAN = frozenset(
    ["CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH", "IDEOGRAPHIC", "BOPOMOFO"]
)
_JOINERS = frozenset(["COMBINING", "VARIATION"])
_UNSEEN = np.iinfo(np.uint16).max
_WITHOUT_MARKS = frozenset(["LATIN", "GREEK", "CYRILLIC", "CJK", "HANGUL"])
_SIGNS = "\u0f0b\u0f0c"
"""Punctuation inside words: the Tibetan mark between syllables."""
_LAST_LETTER = 0x20000
"""Letters from here on are Chinese."""


@dataclass(frozen=True)
class Letters:
    """The characters that words of a script are made of.

    Attributes:
        letter: one of its letters.
        marks: combining marks of the script; none for scripts that are read without them, such as
            Latin and Chinese.
        signs: punctuation inside words.
        all: letters, marks and signs.
    """

    letter: str
    marks: str
    signs: str
    all: str


@cache
def letters_of(script: str) -> Letters:
    """Return the characters of words of a script, named as in `Characters`."""
    kinds = _all_characters()
    chars = [
        chr(point)
        for point in np.flatnonzero(
            kinds.kinds(np.arange(_LAST_LETTER)) == kinds.names.index(script)
        )
    ]
    marks = (
        ""
        if script in _WITHOUT_MARKS
        else "".join(char for char in chars if unicodedata.category(char)[0] == "M")
    )
    signs = "".join(char for char in chars if char in _SIGNS)
    letter = min(chars, key=lambda char: (unicodedata.category(char) not in ("Lo", "Ll"), char))
    return Letters(letter, marks, signs, "".join(chars))


class Characters:
    """The kinds of characters, as small numbers.

    A script is the first word of the Unicode names of its letters (`CJK`, `LATIN`, `THAI`); Chinese
    and Japanese letters are one.

    Attributes:
        names: name of each kind; from index 4 on they are scripts, in the order in which they were
            found.
    """

    def __init__(self) -> None:
        self.names = ["other", "space", "joiner", "wide punctuation", "LATIN"]
        self._kinds = np.full(0x110000, _UNSEEN, np.uint16)

    def kinds(self, codepoints: np.ndarray) -> np.ndarray:
        """Return the kind of each code point: uint16, of the shape of `codepoints`."""
        result = self._kinds[codepoints]
        unseen = np.unique(codepoints[result == _UNSEEN])
        if len(unseen):
            self._kinds[unseen] = [self._kind(chr(codepoint)) for codepoint in unseen.tolist()]
            result = self._kinds[codepoints]
        return result

    def _kind(self, char: str) -> int:
        category = unicodedata.category(char)
        script = unicodedata.name(char, "UNNAMED").split(" ")[0]
        if char in (" ", SPACE):
            return BLANK
        if char in ZERO_WIDTH or (category[0] in "LM" and script in _JOINERS):
            return JOINER
        if category[0] in "LM" or char == "〇" or char in _SIGNS:
            script = "CJK" if script in _HAN else script
            if script not in self.names:
                self.names.append(script)
            return self.names.index(script)
        return WIDE if category[0] == "P" and unicodedata.east_asian_width(char) in "WF" else OTHER


@cache
def first_bytes(latin: bool) -> frozenset[bytes]:
    """Return what characters that are in text of any script begin with.

    That is their UTF-8 without the last byte, and all that this begins with.

    Args:
        latin: with Latin, phonetic and modifier letters and common marks; else punctuation, symbols
            and emoji only.
    """
    kinds = _all_characters()
    points = [point for first, stop in _COMMON for point in range(first, stop)]
    if latin:
        points += [
            point
            for first, stop in (*_COMMON_MARKS, *_LATIN_BLOCKS)
            for point in range(first, stop)
        ]
        points += np.flatnonzero(
            kinds.kinds(np.arange(_LAST_LETTER)) == kinds.names.index("LATIN")
        ).tolist()
    encoded = {chr(point).encode()[:-1] for point in points if point >= 0x80}
    return frozenset(text[:size] for text in encoded for size in range(1, len(text) + 1))


@cache
def first_bytes_inside_words(scripts: frozenset[str], latin: bool) -> frozenset[bytes]:
    """Return those of `first_bytes` that letters, marks and joiners of scripts begin with, too."""
    points = [point for first, stop in _COMMON_MARKS for point in range(first, stop)]
    chars = {
        *ZERO_WIDTH,
        *map(chr, points),
        *(char for script in scripts for char in letters_of(script).all),
    }
    encoded = {char.encode()[:-1] for char in chars} & first_bytes(latin)
    return frozenset(text[:size] for text in encoded for size in range(1, len(text) + 1))


def only_marks(text: str) -> bool:
    """Return whether a text has nothing but marks that join any letter, and spaces."""
    return set(
        _all_characters().kinds(np.array([ord(char) for char in text], np.int64)).tolist()
    ) <= {BLANK, JOINER}


@cache
def _all_characters() -> Characters:
    characters = Characters()
    characters.kinds(np.arange(_LAST_LETTER))
    return characters


def joins(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return whether a token may hold two neighbors of these kinds: bool, of the shape of both.

    A space opens a token and is not inside one. Digits and Western punctuation stay alone, so that
    numbers and code keep their tokens.
    """
    same = (left == right) & (left != BLANK)
    return (
        (left != OTHER)
        & (right != OTHER)
        & (right != BLANK)
        & (same | (left == BLANK) | (left == JOINER) | (right == JOINER))
    )


def target_kinds(letters: np.ndarray, names: list[str]) -> tuple[frozenset[int], bool]:
    """Choose the kinds of characters that new tokens are made of.

    A corpus of which a quarter of the letters are not Latin is one of another script: new tokens
    are then of the other scripts and of East Asian punctuation alone, so text that has none of
    these keeps its tokens. (A quarter, because a Chinese character says as much as several Latin
    letters.) Otherwise they are of all scripts. Scripts with less than 1% of those letters are left
    out.

    Args:
        letters: how often each kind occurs in the corpus.
        names: name of each kind, as in `Characters`.

    Returns:
        The kinds, and whether they are of another script than Latin.
    """
    scripts = {kind: int(letters[kind]) for kind in range(_FIRST_SCRIPT, len(letters))}
    other = {kind: count for kind, count in scripts.items() if names[kind] != "LATIN"}
    distinct = sum(other.values()) * 4 >= sum(scripts.values()) > 0
    chosen = other if distinct else scripts
    kinds = {
        kind for kind, count in chosen.items() if count * 100 >= sum(chosen.values()) and count
    }
    return frozenset(kinds | {WIDE} if distinct else kinds), distinct
