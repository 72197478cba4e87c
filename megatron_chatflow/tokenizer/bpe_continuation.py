"""Byte-pair merges continued where a vocabulary ends.

The classic algorithm: the pair that occurs most often becomes a token, everywhere, again and again.
It starts not from bytes but from the tokens that the existing vocabulary makes of the text, so each
new token is two tokens that really are neighbors, and can be reached (arXiv 2512.03989). The text
is one array with links to the neighbors, and a merge is a few array operations over the places of
its pair.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_chatflow.tokenizer.merge_candidates import NEW_SYMBOL, UNKNOWN_CHARACTER, SymbolText

_LEAST = 2
"""Occurrences that a new token has at least."""


@dataclass(frozen=True)
class LearnedToken:
    """A new token.

    Attributes:
        left: its first part; or the character that it is.
        right: its second part; None for a character.
        count: how often the parts were neighbors when it was learned.
    """

    left: int
    right: int | None
    count: int


def continue_merges(
    chunks: Mapping[bytes, int],
    text: SymbolText,
    wanted: int,
    allowed: Callable[[bytes], bool],
    by_count: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[LearnedToken]:
    """Learn new tokens, the one that saves most tokens first.

    A pair saves a token wherever it occurs; a character without a piece saves all its bytes but
    one.

    Args:
        chunks: runs of symbols (the bytes of int32) and how often each occurs.
        text: UTF-8 of each symbol; that of the new ones is added to it.
        wanted: how many tokens to learn.
        allowed: whether a text may become a token.
        by_count: sort characters by how often they occur, not by what they save.
        progress: called with how many are learned.

    Returns:
        The new tokens, of which the i-th is the symbol `NEW_SYMBOL + i`; fewer than `wanted` when
        no other occurs twice. They depend on the runs and their counts alone, not on the order of
        the runs: of equally good ones, the one with the smaller parts is first.
    """
    state = _LinkedText(chunks, by_count, text)
    learned: list[LearnedToken] = []
    while len(learned) < wanted and (best := state.best()) is not None:
        new = text[best.left] if best.right is None else text[best.left] + text[best.right]
        if not allowed(new):
            state.drop(best)
            continue
        symbol = NEW_SYMBOL + len(learned)
        text[symbol] = new
        state.apply(best, symbol)
        learned.append(best)
        progress(len(learned))
    return learned


class _LinkedText:
    """The text as linked symbols, and where each pair is.

    A pair is stored as left << 32 | right, a character without a piece as minus its symbol. Every
    place of a pair becomes known when the younger of its parts is created, so places are never
    added to a pair; places that no longer hold it are found by comparing symbols.
    """

    def __init__(self, chunks: Mapping[bytes, int], by_count: bool, text: SymbolText) -> None:
        # All runs one after the other: symbol, weight (how often its run occurs), and the places of
        # the left and right neighbor within the run or -1, int32 and int64 [symbols].
        sizes = np.fromiter((len(chunk) // 4 for chunk in chunks), np.int64, len(chunks))
        self._symbol = np.frombuffer(b"".join(chunks), np.int32).copy()
        self._weight = np.repeat(np.fromiter(chunks.values(), np.int64, len(chunks)), sizes)
        total = len(self._symbol)
        last = np.cumsum(sizes) - 1
        self._right = np.arange(1, total + 1, dtype=np.int32)
        self._right[last] = -1
        self._left = np.arange(-1, total - 1, dtype=np.int32)
        self._left[last - sizes + 1] = -1
        self._counts: dict[int, int] = {}
        self._places: dict[int, np.ndarray] = {}
        self._heap: list[tuple[int, int]] = []
        # Candidates, most saving first: all pairs, then characters that have no piece.
        self._add_pairs(np.flatnonzero(self._right >= 0))
        unknown = np.flatnonzero(self._symbol >= UNKNOWN_CHARACTER)
        for symbol, count, places in self._groups(
            self._symbol[unknown].astype(np.int64), unknown, _LEAST
        ):
            self._places[-symbol] = places
            self._counts[-symbol] = count
            gain = count if by_count else count * max(1, len(text[symbol]) - 1)
            heapq.heappush(self._heap, (-gain, -symbol))

    def best(self) -> LearnedToken | None:
        """Return the pair or character that saves most; None when there is none."""
        while self._heap:
            # Counts in the heap may be too high by now: correct the top until it is exact.
            gain, key = self._heap[0]
            count = self._counts.get(key)
            if count is None:
                heapq.heappop(self._heap)
            elif key >= 0 and count != -gain:
                heapq.heapreplace(self._heap, (-count, key))
            else:
                return (
                    LearnedToken(key >> 32, key & 0xFFFFFFFF, count)
                    if key >= 0
                    else LearnedToken(-key, None, count)
                )
        return None

    def drop(self, token: LearnedToken) -> None:
        """Forget a pair or character that may not become a token."""
        key = _key(token)
        del self._counts[key], self._places[key]

    def apply(self, token: LearnedToken, new: int) -> None:
        """Put the symbol `new` wherever the token occurs."""
        key = _key(token)
        at = self._places[key]
        self.drop(token)
        if token.right is None:
            self._symbol[at] = new
        else:
            # The right symbol of each pair, `gone`, is unlinked; pairs with it and with the symbol
            # before are counted off, int64 [places].
            at = self._still_there(at, token.left, token.right)
            gone = self._right[at]
            behind = self._right[gone]
            before = self._left[at]
            self._remove_pairs(np.unique(np.concatenate([before[before >= 0], gone[behind >= 0]])))
            self._symbol[at] = new
            self._symbol[gone] = -1
            self._right[at] = behind
            self._left[behind[behind >= 0]] = at[behind >= 0]
        # New pairs are those of the new symbol with its neighbors.
        before = self._left[at]
        self._add_pairs(np.unique(np.concatenate([before[before >= 0], at[self._right[at] >= 0]])))

    def _still_there(self, at: np.ndarray, left: int, right: int) -> np.ndarray:
        """Return those places, in order, that still hold the pair: int64 [m].

        In a run of one symbol that is every other place, from the first.
        """
        at = at[self._symbol[at] == left]
        at = at[self._right[at] >= 0]
        at = at[self._symbol[self._right[at]] == right]
        if left != right or not len(at):
            return at
        # In a run of overlapping pairs (aaaa), take those at an even distance from its beginning.
        opens = np.flatnonzero(np.concatenate([[True], at[1:] != self._right[at[:-1]]]))
        lengths = np.diff(np.append(opens, len(at)))
        return at[(np.arange(len(at)) - np.repeat(opens, lengths)) % 2 == 0]

    def _pairs_at(self, at: np.ndarray, least: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield the pairs that begin at the places, as `_groups` does.

        Those with a character without a piece are left out.
        """
        left, right = self._symbol[at], self._symbol[self._right[at]]
        known = ((left < UNKNOWN_CHARACTER) | (left >= NEW_SYMBOL)) & (
            (right < UNKNOWN_CHARACTER) | (right >= NEW_SYMBOL)
        )
        return self._groups((left[known].astype(np.int64) << 32) | right[known], at[known], least)

    def _add_pairs(self, at: np.ndarray) -> None:
        for key, count, places in self._pairs_at(at, _LEAST):
            self._counts[key] = count
            self._places[key] = places
            heapq.heappush(self._heap, (-count, key))

    def _remove_pairs(self, at: np.ndarray) -> None:
        for key, gone, _ in self._pairs_at(at, 1):
            count = self._counts.get(key)
            if count is None:
                continue
            if count - gone >= _LEAST:
                self._counts[key] = count - gone
            else:
                del self._counts[key], self._places[key]

    def _groups(
        self, keys: np.ndarray, places: np.ndarray, least: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield each key with how often it occurs and its places, ascending.

        Keys that occur less than `least` times are left out.
        """
        if not len(keys):
            return iter(())
        # Sort places by key; each key is then one slice, whose weights are added up.
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts = np.add.reduceat(self._weight[places], starts)
        stops = np.append(starts[1:], len(keys))
        kept = counts >= least
        rows = zip(
            keys[starts[kept]].tolist(),
            counts[kept].tolist(),
            starts[kept].tolist(),
            stops[kept].tolist(),
            strict=True,
        )
        return ((key, count, places[start:stop]) for key, count, start, stop in rows)


def _key(token: LearnedToken) -> int:
    return -token.left if token.right is None else token.left << 32 | token.right
