"""SentencePiece models."""

import pytest
import sentencepiece
from hypothesis import given

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from tests.tokenizer import samples


def load(path, type="SentencePieceTokenizer"):
    return load_tokenizer(type, tokenizer_model=path)


@pytest.fixture(scope="module")
def library(files):
    return sentencepiece.SentencePieceProcessor(model_file=str(files / "bytes.model"))


@given(text=samples.texts)
def test_ids_and_text_are_those_of_the_library(files, library, text):
    tokenizer = load(files / "bytes.model")
    ids = tokenizer.encode(text)
    assert ids == library.encode_as_ids(text)
    assert tokenizer.decode(ids) == library.decode(ids)


def test_a_batch_gives_the_ids_of_each_text_on_any_number_of_threads(files):
    tokenizer = load(files / "bytes.model")
    expected = [tokenizer.encode(text) for text in samples.TEXTS]
    assert (
        tokenizer.encode_batch(samples.TEXTS)
        == tokenizer.encode_batch(samples.TEXTS, num_threads=2)
        == expected
    )
    assert tokenizer.encode_batch([]) == []


@given(text=samples.texts)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text_and_the_space_before_it(files, text):
    tokenizer = load(files / "bytes.model")
    total = tokenizer.token_bytes()[tokenizer.encode(text)].sum()
    assert total == len(text.replace("\u2581", " ").encode()) + bool(text)


@given(text=samples.texts)
def test_with_normalization_and_unknown_characters_the_bytes_are_those_of_the_known_normalized_text(
    files, text
):
    tokenizer = load(files / "unigram.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(files / "unigram.model"))
    ids = tokenizer.encode(text)
    unknown = sum(
        len(piece.encode())
        for piece, i in zip(library.encode_as_pieces(text), ids, strict=True)
        if i == library.unk_id()
    )
    assert tokenizer.token_bytes()[ids].sum() + unknown == len(
        library.Normalize(text).replace("\u2581", " ").encode()
    )


def test_control_tokens_stand_for_no_bytes(files):
    tokenizer = load(files / "bytes.model")
    assert tokenizer.token_bytes()[[0, tokenizer.bos, tokenizer.eod]].tolist() == [0, 0, 0]
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size


def test_control_tokens_in_text_are_text(files):
    tokenizer = load(files / "bytes.model")
    assert not {tokenizer.bos, tokenizer.eod} & set(tokenizer.encode("</s> <s> </s>"))


def test_control_tokens_are_found_by_their_spelling(files):
    tokenizer = load(files / "chat.model")
    assert tokenizer.control_id("<|im_start|>") == tokenizer.encode("<|im_start|>")[-1]
    assert tokenizer.control_id("</s>") == tokenizer.eod
    assert tokenizer.control_id("<|im_middle|>") is None


@pytest.mark.parametrize("symbol", ["<eod>", "<EOD>"])
def test_documents_end_with_the_eod_symbol_where_the_model_has_one(tmp_path, symbol):
    path = samples.write_sentencepiece(tmp_path / "eod.model", control_symbols=[symbol])
    tokenizer = load(path)
    assert (tokenizer.eod, tokenizer.bos, tokenizer.pad) == (3, 1, None)
    assert [load(path, type).eod for type in ("GPTSentencePieceTokenizer", "Llama2Tokenizer")] == [
        2,
        2,
    ]
    assert tokenizer.fingerprint() != load(path, "Llama2Tokenizer").fingerprint()


def test_a_symbol_that_ends_documents_has_no_bytes_even_when_it_is_user_defined(tmp_path):
    tokenizer = load(
        samples.write_sentencepiece(
            tmp_path / "eod.model", user_defined_symbols=["<eod>"], pad_id=3
        )
    )
    assert tokenizer.token_bytes()[tokenizer.eod] == 0
    assert tokenizer.pad == 3


def test_a_model_without_an_end_token_is_refused(tmp_path):
    path = samples.write_sentencepiece(tmp_path / "endless.model", eos_id=-1)
    with pytest.raises(ChatflowError, match="neither <eod> nor an eos token .*: train it with"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100, b"text"])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(
        ChatflowError, match=r"x\.model is not a SentencePiece model: give the \.model file"
    ):
        load(tmp_path / "x.model")


def test_ids_of_the_padding_of_the_vocabulary_are_left_out_of_text(files):
    tokenizer = load(files / "bytes.model")
    ids = tokenizer.encode("free and equal")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, -1]) == "free and equal"
