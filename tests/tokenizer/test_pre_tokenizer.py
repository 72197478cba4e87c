"""Pre-tokenizers take the marks of scripts as letters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.tokenizer.pre_tokenizer import cut_scripts, join_marks
from megatron_chatflow.tokenizer.unicode_scripts import ZERO_WIDTH, letters_of
from tests.tokenizer.marks import LATIN, LINES, PRE_TOKENIZERS, splitter

others = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


texts = st.lists(
    st.sampled_from(LATIN[:1] + LATIN[-3:-1])
    | others
    | st.sampled_from(list("e\u0301 \u200d\u200cก'1ä")),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize(
    "text", [LATIN[0], LATIN[1], *LATIN[-3:]], ids=["french", "english", "other", "emoji", "code"]
)
def test_text_of_scripts_without_marks_is_split_as_before(name, text):
    assert splitter(name, tuple(LINES))(text) == splitter(name)(text)


@settings(max_examples=300)
@given(name=st.sampled_from([*PRE_TOKENIZERS]), text=texts)
def test_only_marks_and_joiners_behind_letters_of_the_scripts_change_where_text_is_split(
    name, text
):
    scripts = ("THAI", "DEVANAGARI")
    joined = {char for script in scripts for char in letters_of(script).marks}
    for a, b in zip(" " + text, text, strict=False):
        if b in ZERO_WIDTH and any(a in letters_of(script).all for script in scripts):
            return
    text = "".join(char for char in text if char not in joined)
    assert splitter(name, scripts)(text) == splitter(name)(text)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize("script", LINES)
def test_words_are_no_longer_cut(name, script):
    assert script in cut_scripts(PRE_TOKENIZERS[name], [script])
    words = splitter(name, (script,))(LINES[script])
    starts = {start for _, (start, _) in words}
    assert starts == {0} | {i for i, char in enumerate(LINES[script]) if char == " "}
    assert cut_scripts(join_marks(name, PRE_TOKENIZERS[name], [script]), LINES) == [
        other for other in LINES if other != script
    ]


def test_scripts_are_joined_one_after_the_other_as_at_once():
    step = join_marks("x", join_marks("x", PRE_TOKENIZERS["llama3"], ["THAI"]), ["SINHALA"])
    assert cut_scripts(step, ["THAI", "SINHALA", "KHMER"]) == ["KHMER"]
