"""Kinds of characters, and where tokens may not reach."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.tokenizer.merge_candidates import SymbolRuns, SymbolText, TargetCharacters
from megatron_chatflow.tokenizer.unicode_scripts import (
    BLANK,
    OTHER,
    WIDE,
    Characters,
    joins,
    target_kinds,
)

CHARACTERS = Characters()


def kinds(text: str) -> list[int]:
    return CHARACTERS.kinds(np.array([ord(char) for char in text], np.uint32)).tolist()


def runs(text: str, **options) -> set[str]:
    """The runs of a text whose tokens are its bytes."""
    data = text.encode()
    kinds = frozenset(
        CHARACTERS.kinds(np.array([ord(char) for char in text], np.uint32)).tolist()
    ) - {OTHER, BLANK}
    chunks = SymbolRuns(TargetCharacters(CHARACTERS, kinds | {WIDE}, False, []))
    table = SymbolText({byte: bytes([byte]) for byte in range(256)})
    chunks.add(
        np.frombuffer(data, np.uint8).astype(np.int32), np.zeros(len(data), bool), table, **options
    )
    return {
        np.frombuffer(run, np.int32).astype(np.uint8).tobytes().decode() for run in chunks.counts
    }


def test_letters_are_of_their_script_and_the_rest_is_not():
    assert len(set(kinds("中々〇かカーㄅ"))) == 1
    assert len(set(kinds("aéőÅ"))) == 1
    assert len({*kinds("中"), *kinds("a"), *kinds("я"), *kinds("ก"), *kinds("α")}) == 5
    assert kinds("。，（「") == [WIDE] * 4
    assert kinds(" \u2581") == [BLANK] * 2
    assert set(kinds("09.,-_\n\t🙂“=€")) == {OTHER}


def test_tokens_hold_letters_of_one_script_with_the_space_before_them():
    assert runs("打开LibreOffice文档, 按 Ctrl+C。。 12文") == {
        "打开",
        "LibreOffice",
        "文档",
        " 按",
        " Ctrl",
        "。。",
        "文",
    }
    assert runs("ร้าน อาหาร") == {"ร้าน", " อาหาร"}
    assert runs("e\u0301te\u0301 ना") == {"e\u0301te\u0301", " ना"}


def test_runs_within_characters_are_the_bytes_of_one_character():
    assert runs("中文a é", within_characters=True) == {"中", "文", "é"}


@given(a=st.characters(), b=st.characters())
def test_whatever_joins_a_space_comes_after_it(a, b):
    left, right = (np.array(kinds(char)) for char in (a, b))
    if b in " \u2581":
        assert not joins(left, right)[0]
    if OTHER in (left[0], right[0]):
        assert not joins(left, right)[0]


def target(**letters: int) -> tuple[set[str], bool]:
    names = ["other", "space", "joiner", "wide punctuation", *letters]
    chosen, distinct = target_kinds(np.array([1000, 1000, 0, 50, *letters.values()]), names)
    return {names[kind] for kind in chosen}, distinct


def test_a_corpus_of_another_script_gives_tokens_of_that_script_alone():
    assert target(LATIN=300, CJK=100, CYRILLIC=0) == ({"CJK", "wide punctuation"}, True)
    assert target(LATIN=10, CJK=1000, CYRILLIC=5) == ({"CJK", "wide punctuation"}, True)
    assert target(LATIN=1000, CJK=20) == ({"LATIN", "CJK"}, False)
    assert target(LATIN=0) == (set(), False)
