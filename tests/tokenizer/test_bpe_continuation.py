"""Merges continued, against the plainest way to do it."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.tokenizer.bpe_continuation import LearnedToken, continue_merges
from megatron_chatflow.tokenizer.merge_candidates import NEW_SYMBOL, UNKNOWN_CHARACTER, SymbolText

UNKNOWN = [UNKNOWN_CHARACTER + ord(char) for char in "é中🙂"]
runs = st.lists(
    st.lists(st.sampled_from([97, 98, 99]) | st.sampled_from(UNKNOWN), min_size=1, max_size=12),
    max_size=12,
)


def as_chunks(lists):
    return Counter(np.array(run, np.int32).tobytes() for run in lists)


def letters() -> SymbolText:
    return SymbolText({code: bytes([code]) for code in range(128)})


def known(symbol: int) -> bool:
    return symbol < UNKNOWN_CHARACTER or symbol >= NEW_SYMBOL


def plainly(lists, wanted: int) -> list[tuple[int, int | None]]:
    """The same by counting everything again before each merge."""
    lists = [list(run) for run in lists]
    learned: list[tuple[int, int | None]] = []
    while len(learned) < wanted:
        pairs = Counter(
            (a, b)
            for run in lists
            for a, b in zip(run, run[1:], strict=False)
            if known(a) and known(b)
        )
        counts = {pair: (count, count) for pair, count in pairs.items()}
        characters = Counter(symbol for run in lists for symbol in run if not known(symbol))
        size = {symbol: len(chr(symbol - UNKNOWN_CHARACTER).encode()) for symbol in characters}
        counts |= {
            (symbol, None): (count, count * (size[symbol] - 1))
            for symbol, count in characters.items()
        }
        candidates = [
            (-gain, pair[1] is not None, pair if pair[1] is not None else (-pair[0],), pair)
            for pair, (n, gain) in counts.items()
            if n >= 2
        ]
        if not candidates:
            break
        pair = min(candidates, key=lambda c: c[:3])[3]
        new = NEW_SYMBOL + len(learned)
        learned.append(pair)
        for run in lists:
            at = 0
            while at < len(run):
                width = 1 if pair[1] is None else 2
                if tuple(run[at : at + width]) == pair[:width]:
                    run[at : at + width] = [new]
                at += 1
    return learned


@given(lists=runs, wanted=st.integers(0, 12))
def test_the_tokens_are_those_of_counting_everything_again_before_each_merge(lists, wanted):
    learned = continue_merges(as_chunks(lists), letters(), wanted, lambda text: True)
    assert [(token.left, token.right) for token in learned] == plainly(lists, wanted)


@given(lists=runs)
def test_the_order_of_the_runs_does_not_matter(lists):
    forwards = continue_merges(as_chunks(lists), letters(), 8, lambda text: True)
    assert continue_merges(as_chunks(lists[::-1]), letters(), 8, lambda text: True) == forwards


def test_a_text_that_is_not_allowed_is_passed_over_and_nothing_is_built_on_it():
    lists = [[97, 98, 99]] * 3 + [[98, 99]]
    text = letters()
    learned = continue_merges(as_chunks(lists), text, 5, lambda new: new != b"bc")
    assert [text[NEW_SYMBOL + i] for i in range(len(learned))] == [b"ab", b"abc"]


def test_characters_come_by_how_often_they_occur_where_that_is_asked_for():
    two, four = UNKNOWN[0], UNKNOWN[2]
    lists = [[two]] * 5 + [[four]] * 3
    assert [
        token.left for token in continue_merges(as_chunks(lists), letters(), 2, lambda text: True)
    ] == [four, two]
    assert [
        token.left
        for token in continue_merges(
            as_chunks(lists), letters(), 2, lambda text: True, by_count=True
        )
    ] == [two, four]


def test_what_occurs_once_is_no_candidate():
    assert continue_merges(as_chunks([[97, 98]]), letters(), 1, lambda text: True) == []
    assert continue_merges(as_chunks([[97, 98]] * 2), letters(), 1, lambda text: True) == [
        LearnedToken(97, 98, 2)
    ]
    assert continue_merges({}, letters(), 1, lambda text: True) == []
