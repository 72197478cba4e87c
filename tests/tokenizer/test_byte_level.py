"""Tokenizers without a file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from tests.tokenizer import samples


@given(text=samples.texts)
def test_bytes_are_the_bytes_of_the_text(text):
    tokenizer = load_tokenizer("ByteLevelTokenizer")
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eod]) == text
    assert tokenizer.token_bytes()[ids].sum() == len(ids)
    assert tokenizer.encode_batch([text, "x"]) == [ids, [120]]


def test_control_tokens_are_no_bytes():
    tokenizer = load_tokenizer("ByteLevelTokenizer")
    control = [tokenizer.eod, tokenizer.bos, tokenizer.pad]
    assert sorted(control) == [256, 257, 258] and tokenizer.vocab_size == 259
    assert tokenizer.token_bytes()[control].sum() == 0


@given(numbers=st.lists(st.integers(0, 999)))
def test_numbers_are_their_own_ids(numbers):
    tokenizer = load_tokenizer("NullTokenizer", vocab_size=1000)
    text = " ".join(map(str, numbers))
    assert tokenizer.encode(text) == numbers
    assert tokenizer.decode(numbers) == text
    assert tokenizer.token_bytes()[numbers].sum() == len(text) + bool(text)
    assert (tokenizer.eod, tokenizer.vocab_size, tokenizer.token_bytes()[1000]) == (1000, 1001, 0)


@pytest.mark.parametrize("text", ["a", "-1", "1.5", "1000", "²"])
def test_text_that_is_no_number_of_the_vocabulary_is_refused(text):
    with pytest.raises(
        ChatflowError, match="is not a number from 0 to 999: the text must be made of such numbers"
    ):
        load_tokenizer("NullTokenizer", vocab_size=1000).encode(text)
