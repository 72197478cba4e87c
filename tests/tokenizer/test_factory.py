"""Tokenizers by name."""

import shutil
import subprocess
import sys

import pytest

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import TOKENIZER_TYPES, Tokenizer, load_tokenizer
from tests.tokenizer import samples


def load_all(files) -> list[Tokenizer]:
    spm = [
        load_tokenizer(type, tokenizer_model=files / "bytes.model") for type in TOKENIZER_TYPES[:3]
    ]
    gpt2 = load_tokenizer(
        "GPT2BPETokenizer",
        vocab_file=files / "gpt2-vocab.json",
        merge_file=files / "gpt2-merges.txt",
    )
    return [
        *spm,
        load_tokenizer("HuggingFaceTokenizer", tokenizer_model=files / "byte_level"),
        gpt2,
        load_tokenizer("TikTokenizer", tokenizer_model=files / "tiktoken.json"),
        load_tokenizer("ByteLevelTokenizer"),
        load_tokenizer("NullTokenizer", vocab_size=10),
    ]


def test_every_type_loads_under_its_own_name(files):
    tokenizers = load_all(files)
    assert tuple(tokenizer.type for tokenizer in tokenizers) == TOKENIZER_TYPES
    for tokenizer in tokenizers:
        assert 0 <= tokenizer.eod < tokenizer.vocab_size == len(tokenizer.token_bytes())
        assert list(tokenizer.identity()) == ["type", "name", "hash", "vocab_size", "eod"]


def test_fingerprints_follow_the_content_and_not_the_path(files, tmp_path):
    tokenizers = load_all(files)
    assert (
        len({tokenizer.fingerprint() for tokenizer in tokenizers}) == len(tokenizers) - 2
    )  # the three names for one SentencePiece model agree
    copy = shutil.copy(files / "bytes.model", tmp_path / "other.model")
    assert (
        load_tokenizer("SentencePieceTokenizer", tokenizer_model=copy).fingerprint()
        == tokenizers[0].fingerprint()
    )
    other = samples.write_sentencepiece(tmp_path / "larger.model", vocab_size=420)
    assert (
        load_tokenizer("SentencePieceTokenizer", tokenizer_model=other).fingerprint()
        != tokenizers[0].fingerprint()
    )
    assert (
        load_tokenizer("NullTokenizer", vocab_size=11).fingerprint() != tokenizers[-1].fingerprint()
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sentencepiecetokenizer", "SentencePieceTokenizer"),
        ("TikTokenTokenizer", "TikTokenizer"),
        ("GPT2BPE", "GPT2BPETokenizer"),
    ],
)
def test_an_unknown_type_is_refused_with_the_nearest(written, meant):
    with pytest.raises(
        ChatflowError, match=f"tokenizer_type '{written}' is unknown: did you mean {meant}\\?"
    ):
        load_tokenizer(written)


def test_a_type_that_is_nothing_like_any_is_refused_with_all_of_them():
    with pytest.raises(
        ChatflowError,
        match="tokenizer_type 'xyz' is unknown: known are SentencePieceTokenizer, .* NullTokenizer",
    ):
        load_tokenizer("xyz")


@pytest.mark.parametrize(
    ("type", "flag"),
    [
        (type, "--tokenizer-model")
        for type in ("Llama2Tokenizer", "HuggingFaceTokenizer", "TikTokenizer")
    ]
    + [("GPT2BPETokenizer", "--vocab-file"), ("NullTokenizer", "--vocab-size")],
)
def test_what_a_type_needs_and_did_not_get_is_named(type, flag):
    with pytest.raises(
        ChatflowError, match=f"{type} needs {flag[2:].replace('-', '_')}: give {flag}"
    ):
        load_tokenizer(type)


@pytest.mark.parametrize("type", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
def test_a_missing_file_is_named(tmp_path, type):
    with pytest.raises(
        ChatflowError,
        match=f"{type}: tokenizer_model .*gone cannot be read .No such file or directory.",
    ):
        load_tokenizer(type, tokenizer_model=tmp_path / "gone")


def test_importing_tokenizers_loads_no_library_and_loading_one_loads_only_its_own():
    code = """
import sys
from megatron_chatflow.tokenizer import load_tokenizer
load_tokenizer('ByteLevelTokenizer').token_bytes()
print(sorted({'torch', 'sentencepiece', 'tokenizers', 'tiktoken'} & set(sys.modules)))
from megatron_chatflow.tokenizer import huggingface, sentencepiece, tiktoken
print('torch' in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[:2] == ["[]", "False"]
