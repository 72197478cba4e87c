"""tokenizer.json files and GPT-2's vocabulary files."""

import json

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from tests.tokenizer import samples

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def load(path):
    return load_tokenizer("HuggingFaceTokenizer", tokenizer_model=path)


@pytest.fixture(scope="module")
def byte_level(files):
    return load(files / "byte_level")


@pytest.fixture(scope="module")
def metaspace(files):
    return load(files / "metaspace" / "tokenizer.json")


@pytest.fixture(scope="module")
def gpt2(files):
    return load_tokenizer(
        "GPT2BPETokenizer",
        vocab_file=files / "gpt2-vocab.json",
        merge_file=files / "gpt2-merges.txt",
    )


@pytest.fixture(scope="module")
def tiktoken_gpt2():
    ranks = samples.byte_ranks(samples.byte_level_bpe())
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


@given(text=samples.texts)
def test_ids_of_gpt2_files_are_those_of_another_library(gpt2, tiktoken_gpt2, text):
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)


@given(text=samples.texts)
def test_ids_of_a_tokenizer_json_are_the_library_s_without_truncation_and_padding(
    files, byte_level, text
):
    library = tokenizers.Tokenizer.from_file(str(files / "byte_level" / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    assert byte_level.encode(text) == library.encode(text).ids


@given(text=samples.texts)
def test_the_bytes_of_byte_level_tokens_are_the_bytes_of_the_text(byte_level, gpt2, text):
    for tokenizer in (byte_level, gpt2):
        ids = tokenizer.encode(text)
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids) == text


@given(text=samples.texts)
def test_the_bytes_of_sentencepiece_like_tokens_are_the_bytes_of_the_text_and_the_space_before_it(
    metaspace, text
):
    total = metaspace.token_bytes()[metaspace.encode(text)].sum()
    assert total == len(text.replace("\u2581", " ").encode()) + bool(text)


def test_special_tokens_in_text_are_text_and_stand_for_no_bytes(byte_level, metaspace, gpt2):
    for tokenizer in (byte_level, metaspace, gpt2):
        special = set(np.flatnonzero(tokenizer.token_bytes() == 0))
        assert tokenizer.eod in special
        assert not special & set(tokenizer.encode("</s><s><|endoftext|><|im_start|>"))


def test_added_tokens_that_are_not_special_are_found_in_text_and_stand_for_their_bytes(byte_level):
    (token,) = byte_level.encode("freedom人")
    assert byte_level.token_bytes()[token] == len("freedom人".encode())


def test_a_batch_gives_the_ids_of_each_text_on_any_number_of_threads(byte_level, metaspace):
    for tokenizer in (byte_level, metaspace):
        expected = [tokenizer.encode(text) for text in samples.TEXTS]
        assert (
            tokenizer.encode_batch(samples.TEXTS)
            == tokenizer.encode_batch(samples.TEXTS, num_threads=2)
            == expected
        )


def test_control_tokens_are_found_by_their_spelling(byte_level):
    assert byte_level.decode([byte_level.control_id("<|im_start|>")]) == "<|im_start|>"
    assert byte_level.control_id("free") is None


def write_json(folder, backend, **files):
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_begin_end_and_padding_are_those_that_the_files_next_to_it_name(tmp_path):
    backend = samples.byte_level_bpe()
    backend.add_special_tokens(["<a>", "<b>", "<c>", "</s>"])
    config = {"eos_token": {"content": "<a>", "lstrip": False}, "pad_token": None}
    other = {"eos_token": "<b>", "bos_token": "<b>", "pad_token": "<c>"}
    tokenizer = load(
        write_json(tmp_path / "model", backend, tokenizer_config=config, special_tokens_map=other)
    )
    assert [tokenizer.eod, tokenizer.bos, tokenizer.pad] == [
        backend.token_to_id(token) for token in ("<a>", "<b>", "<c>")
    ]
    assert tokenizer.name == "model"
    assert tokenizer.vocab_size == backend.get_vocab_size()


@pytest.mark.parametrize(
    ("special", "config", "message"),
    [
        ([], {}, "none of the usual ones is among its special tokens"),
        (["</s>", "<|endoftext|>"], {}, "it has <|endoftext|>, </s>"),
        (["</s>"], {"eos_token": "<gone>"}, "eos_token '<gone>' is not in the vocabulary"),
    ],
)
def test_an_ambiguous_end_token_is_refused(tmp_path, special, config, message):
    backend = samples.byte_level_bpe()
    backend.add_special_tokens(special)
    with pytest.raises(ChatflowError) as error:
        load(write_json(tmp_path, backend, tokenizer_config=config))
    assert message in str(error.value)


def test_files_of_another_kind_are_refused(files, tmp_path):
    with pytest.raises(ChatflowError, match=r"bytes\.model is not a tokenizer\.json"):
        load(files / "bytes.model")
    with pytest.raises(
        ChatflowError,
        match="cannot be read .No such file or directory.: give the path of a file on this machine",
    ):
        load(tmp_path)
    write_json(tmp_path, samples.byte_level_bpe())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ChatflowError, match=r"tokenizer_config\.json is not JSON"):
        load(tmp_path)
    with pytest.raises(ChatflowError, match=r"are not the vocab\.json and merges\.txt"):
        load_tokenizer(
            "GPT2BPETokenizer",
            vocab_file=files / "bytes.model",
            merge_file=files / "gpt2-merges.txt",
        )
    (tmp_path / "vocab.json").write_text(json.dumps(samples.byte_level_bpe().get_vocab()))
    with pytest.raises(ChatflowError, match="lacks <|endoftext|>: add it"):
        load_tokenizer(
            "GPT2BPETokenizer",
            vocab_file=tmp_path / "vocab.json",
            merge_file=files / "gpt2-merges.txt",
        )


def test_a_tokenizer_that_loses_spaces_has_no_table_of_bytes(tmp_path):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]")
    )
    backend.add_special_tokens(["</s>"])
    tokenizer = load(write_json(tmp_path, backend))
    with pytest.raises(
        ChatflowError, match="loses spaces, .*: use a byte-level or a SentencePiece-like tokenizer"
    ):
        tokenizer.token_bytes()
