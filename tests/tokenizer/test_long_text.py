"""Texts encoded in pieces: the tokens of the text at once, for every kind of tokenizer."""

import random

import pytest
import tokenizers

from megatron_chatflow.tokenizer import load_tokenizer, long_text
from megatron_chatflow.tokenizer.long_text import encode_in_pieces
from tests.tokenizer import bases, samples

KINDS = {
    "byte fallback": ("SentencePieceTokenizer", "bytes.model"),
    "user-defined symbols": ("SentencePieceTokenizer", "chat.model"),
    "byte-level": ("HuggingFaceTokenizer", "byte_level"),
    "metaspace": ("HuggingFaceTokenizer", "metaspace"),
    "tiktoken": ("TikTokenizer", "tiktoken.json"),
    "bytes": ("ByteLevelTokenizer", None),
}
SNIPPETS = [
    *samples.TEXTS,
    "word",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    " \n ",
    "。",
    "!",
    ".\n",
    "人人生而自由，在尊严和权利上一律平等。",
    "กำลัง",
    "e\u0301",
    "freedom人",
    "<|im_start|>",
    "</s>",
    "123456789",
    "▁",
    "\u3000",
    "\u200d",
    "'s",
]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 300)


def _long_text(seed: int, snippets: list[str], size: int = 20_000) -> str:
    choose = random.Random(seed)
    parts, length = [], 0
    while length < size:
        parts.append(choose.choice(snippets) * choose.choice((1, 1, 1, 2, 7)))
        length += len(parts[-1])
    return "".join(parts)


def _pieces_of(tokenizer, text: str) -> list[str]:
    """Encode text in pieces, compare with the text at once, and return the pieces."""
    seen = []
    encode = tokenizer.encode
    expected = encode(text)
    tokenizer.encode = lambda part: seen.append(part) or encode(part)
    try:
        assert encode_in_pieces(tokenizer, text).tolist() == expected
    finally:
        del tokenizer.encode
    return [part for part in seen if len(part) > 2 * long_text._CONTEXT]


@pytest.fixture(params=KINDS)
def tokenizer(request, files):
    kind, name = KINDS[request.param]
    return load_tokenizer(kind, tokenizer_model=name and files / name)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_encode_to_the_tokens_of_the_text(tokenizer, small_pieces, seed):
    text = _long_text(seed, SNIPPETS)
    assert max(map(len, _pieces_of(tokenizer, text))) < len(text)


def test_prose_is_encoded_in_pieces_of_about_the_size(tokenizer, monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 1000)
    text = "\n".join(bases.documents("en"))[:50_000]
    found = _pieces_of(tokenizer, text)
    assert len(found) > 20 and max(map(len, found)) < 3000


@pytest.mark.parametrize("pattern", [None, bases.LLAMA3])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_split_patterns_do_not_depend_on_the_pieces(tmp_path, small_pieces, pattern, ignore_merges):
    backend = tokenizers.Tokenizer.from_str(
        bases.english_bytes(1000, pattern, ignore_merges).decode()
    )
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path)
    for seed in range(3):
        text = _long_text(seed, SNIPPETS)
        assert max(map(len, _pieces_of(tokenizer, text))) < len(text)


@pytest.mark.parametrize("name", ["nmt_nfkc", "nfkc_cf", "identity"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"split_by_whitespace": False},
    ],
)
def test_normalizers_do_not_depend_on_the_pieces(tmp_path, small_pieces, name, options):
    model = samples.write_sentencepiece(
        tmp_path / "a.model", normalization_rule_name=name, **options
    )
    tokenizer = load_tokenizer("SentencePieceTokenizer", tokenizer_model=model)
    for seed in range(3):
        _pieces_of(tokenizer, _long_text(seed, SNIPPETS, 10_000))


def test_a_text_without_seams_and_a_unigram_model_are_encoded_at_once(files, small_pieces):
    byte_level = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=files / "byte_level")
    assert _pieces_of(byte_level, "x" * 5000) == ["x" * 5000]
    unigram = load_tokenizer("SentencePieceTokenizer", tokenizer_model=files / "unigram.model")
    text = "All human beings are born free. " * 200
    assert _pieces_of(unigram, text) == [text]


def test_a_piece_that_disagrees_with_its_seams_gives_way_to_the_text_at_once(files, small_pieces):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=files / "byte_level")
    text = "free and equal " * 400
    encode = tokenizer.encode
    # a tokenizer that behaves in another way when a text is long
    tokenizer.encode = lambda part: encode(part if len(part) < 520 else part.upper())
    assert encode_in_pieces(tokenizer, text).tolist() == encode(text.upper())
