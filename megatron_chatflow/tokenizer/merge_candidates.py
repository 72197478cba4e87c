"""Encoded text to the runs of tokens in which new tokens are learned."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_chatflow.tokenizer.unicode_scripts import (
    WIDE,
    ZERO_WIDTH,
    Characters,
    joins,
    letters_of,
    target_kinds,
)

UNKNOWN_CHARACTER = 1 << 24
"""Symbols from here on are characters that the vocabulary has no piece for.

They are this number plus the code point. Smaller symbols are ids.
"""

NEW_SYMBOL = 1 << 26
"""Symbols from here on are new tokens, in the order in which they were learned."""


class SymbolText(dict[int, bytes]):
    """UTF-8 of each symbol; that of characters without a piece is made on demand."""

    def __missing__(self, symbol: int) -> bytes:
        assert UNKNOWN_CHARACTER <= symbol < NEW_SYMBOL, symbol
        self[symbol] = text = chr(symbol - UNKNOWN_CHARACTER).encode()
        return text


@dataclass(frozen=True)
class TargetCharacters:
    """What new tokens are made of.

    Attributes:
        characters: numbers of the kinds of characters.
        kinds: the kinds that new tokens have; empty where a corpus has no letters.
        other_script: whether these are of other scripts than Latin.
        marked: scripts among them that the corpus has combining marks or zero-width joiners of.
    """

    characters: Characters
    kinds: frozenset[int]
    other_script: bool
    marked: list[str]

    @property
    def scripts(self) -> frozenset[str]:
        """The names of those of the kinds that are scripts."""
        return frozenset(self.characters.names[kind] for kind in self.kinds if kind > WIDE)


def find_target(batches: Iterable[Sequence[str]]) -> TargetCharacters:
    """Choose the kinds of characters for the new tokens of a corpus."""
    characters = Characters()
    letters = np.zeros(0, np.int64)
    seen: set[int] = set()
    for batch in batches:
        codepoints = np.frombuffer("".join(batch).encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds = characters.kinds(codepoints)
        found = np.bincount(kinds, minlength=len(characters.names))
        found[: len(letters)] += letters
        letters = found
        seen.update(np.unique(codepoints).tolist())
    kinds, other_script = target_kinds(letters, characters.names)
    scripts = [characters.names[kind] for kind in sorted(kinds) if kind > WIDE]
    marks = {script: letters_of(script).marks for script in scripts}
    marked = [
        script
        for script in scripts
        if marks[script] and not seen.isdisjoint(map(ord, marks[script] + ZERO_WIDTH))
    ]
    return TargetCharacters(characters, kinds, other_script, marked)


@dataclass
class SymbolRuns:
    """Runs of symbols between which no new token may reach, and how often each occurs.

    Attributes:
        target: kinds of characters of the runs.
        counts: the runs, as the bytes of int32 symbols.
    """

    target: TargetCharacters
    counts: Counter[bytes] = field(default_factory=Counter)

    def add(
        self,
        symbols: np.ndarray,
        ends: np.ndarray,
        text: SymbolText,
        within_characters: bool = False,
    ) -> None:
        """Count the runs of encoded documents.

        Args:
            symbols: tokens and characters without a piece int32[n].
            ends: whether the tokenizer never merges a symbol with the next one bool[n].
            text: UTF-8 of each symbol.
            within_characters: runs are the parts of one character.
        """
        if not len(symbols):
            return
        # The text as bytes [bytes], with the kind of each character, where each character opens and
        # each symbol begins (`first`) and ends (`last`), int64 [n].
        parts = [text[symbol] for symbol in symbols.tolist()]
        joined = b"".join(parts)
        codepoints = np.frombuffer(joined.decode().encode("utf-32-le"), np.uint32)
        kinds = self.target.characters.kinds(codepoints)
        widths = 1 + (codepoints >= 0x80) + (codepoints >= 0x800) + (codepoints >= 0x10000)
        kind_at = np.repeat(kinds, widths)
        opens = np.zeros(len(joined), bool)
        opens[np.cumsum(widths) - widths] = True
        last = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        first = np.concatenate([[0], last[:-1]])
        # Which neighboring symbols a token may hold together: bool [n - 1].
        border = first[1:]
        inside = ~opens[border]
        together = (
            inside & _parts_of_one_character(opens, first, last)
            if within_characters
            else inside | joins(kind_at[border - 1], kind_at[border])
        )
        together &= ~ends[:-1]

        # Runs of symbols, of which those of the target's kinds with anything to learn are counted.
        starts = np.flatnonzero(np.concatenate([[True], ~together]))
        stops = np.append(starts[1:], len(symbols))
        kind = np.maximum.reduceat(kind_at, first[starts])
        useful = np.isin(kind, [*self.target.kinds]) & (
            (stops - starts > 1) | (symbols[starts] >= UNKNOWN_CHARACTER)
        )
        data = symbols.astype(np.int32).tobytes()
        for start, stop in zip(
            (starts[useful] * 4).tolist(), (stops[useful] * 4).tolist(), strict=True
        ):
            self.counts[data[start:stop]] += 1


def _parts_of_one_character(opens: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return whether each symbol and the next one hold only bytes of one character: bool [n - 1].

    `opens` says where characters begin.
    """
    characters = np.add.reduceat(opens.astype(np.int64), first)
    closed = opens[np.minimum(last, len(opens) - 1)] | (last == len(opens))
    fragment = (characters == 0) | ((characters == 1) & opens[first] & ~closed)
    return fragment[:-1] & fragment[1:]
