"""How many tokens a tokenizer takes, against counting by hand."""

import pytest

from megatron_chatflow.report.fertility_table import fertility_table
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.fertility import compare


@pytest.fixture(scope="module")
def pair(files):
    """Bytes, and a byte-level BPE."""
    return load_tokenizer("ByteLevelTokenizer"), load_tokenizer(
        "HuggingFaceTokenizer", tokenizer_model=files / "byte_level"
    )


def test_rates_are_those_of_the_counts(pair):
    texts = ["free and equal", "born"]
    found = compare(*pair, texts)
    tokens = sum(len(pair[1].encode(text)) for text in texts)
    assert (found.documents, found.characters, found.bytes) == (2, 18, 18)
    assert (found.before.tokens, found.after.tokens) == (18, tokens)
    assert (found.before.tokens_per_word, found.after.tokens_per_word) == (4.5, tokens / 4)
    assert (found.before.tokens_per_character, found.before.bytes_per_token) == (1.0, 1.0)
    assert found.change == pytest.approx(tokens / 18 - 1)
    assert found.unchanged_documents == 0
    assert (found.before.round_trips, found.after.round_trips) == (2, 2)


def test_text_without_spaces_between_words_has_no_tokens_per_word(pair):
    for text in ("人人生而自由", "มนุษย์ทั้งหลายเกิดมามีอิสระ", "すべての人間は"):
        assert compare(*pair, [text]).after.tokens_per_word is None
    assert (
        compare(*pair, ["Minden emberi lény szabadon születik"]).after.tokens_per_word is not None
    )


def test_documents_that_are_not_given_back_are_counted(files):
    lossy = load_tokenizer("SentencePieceTokenizer", tokenizer_model=files / "unigram.model")
    found = compare(load_tokenizer("ByteLevelTokenizer"), lossy, ["free", "龘龘"])
    assert (found.before.round_trips, found.after.round_trips) == (2, 1)


def test_examples_are_spelled_with_bars_between_tokens(pair):
    found = compare(*pair, ["free 人"], examples=1)
    assert found.examples[0]["before"] == "f|r|e|e| |人(3)"


def test_the_table_has_a_row_for_each_language_and_its_examples(pair):
    languages = {
        "en": compare(*pair, ["free and equal"]).to_json(),
        "zh": compare(*pair, ["人人生而自由"]).to_json(),
    }
    lines = list(fertility_table(languages))
    assert (
        lines[0].startswith("held out") and lines[1].startswith("en") and lines[2].startswith("zh")
    )
    assert " 14 -> " in lines[1] and "- -> -" in lines[2]
    assert len({len(line) for line in lines[:3]}) == 1
    assert any("f|r|e|e| |a|n|d" in line for line in lines[3:])
