"""The bytes of the labels of windows are the UTF-8 bytes of their text, also where a space is
written with three byte pieces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.data.blend.document_dataset import DocumentDataset
from megatron_chatflow.model.forward import label_bytes, make_forward_step
from megatron_chatflow.tokenizer import TokenBytes, Tokenizer, load_tokenizer
from tests.tokenizer import samples

DATA = Path(__file__).parents[2] / "examples" / "quickstart" / "data"
PLAIN = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "vocab_size": 500,
}
KINDS = ("bpe", "unigram", "no_prefix", "metaspace", "metaspace_decoder")
PREFIXED = {"bpe", "unigram", "metaspace"}
"""Kinds whose tokenizer puts a space before every document."""


def _without_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    description = json.loads(backend.to_str())
    vocab, merges = description["model"]["vocab"], description["model"]["merges"]
    vocab["\ue000"] = vocab.pop("\u2581")
    description["model"]["merges"] = [
        pair for pair in merges if "\u2581" not in pair and "\u2581" not in "".join(pair)[1:]
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    options = {
        "bpe": {},
        "unigram": {"model_type": "unigram"},
        "no_prefix": {"add_dummy_prefix": False},
    }
    result = {}
    for kind, more in options.items():
        path = folder / f"{kind}.model"
        path.write_bytes(samples.without_space(samples.sentencepiece_model(**PLAIN, **more)))
        result[kind] = load_tokenizer("SentencePieceTokenizer", tokenizer_model=path)
    backend = _without_space(samples.metaspace_bpe())
    for kind in ("metaspace", "metaspace_decoder"):
        if kind == "metaspace_decoder":
            backend.normalizer = None
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
            steps = [
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Metaspace(prepend_scheme="never"),
            ]
            backend.decoder = tokenizers.decoders.Sequence(steps)
        backend.save(str(folder / f"{kind}.json"))
        result[kind] = load_tokenizer(
            "HuggingFaceTokenizer", tokenizer_model=folder / f"{kind}.json"
        )
    return result


def _texts(name: str, most: int) -> list[str]:
    return [
        json.loads(line)["text"]
        for line in (DATA / f"{name}.jsonl").read_text().splitlines()[:most]
    ]


def _sum(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> int:
    """Bytes of rows of tokens, each one longer than its window."""
    count = TokenBytes.of(tokenizer, tokenizer.vocab_size + 7)
    rows = torch.tensor(rows)
    batch = {
        "tokens": rows[:, :-1],
        "labels": rows[:, 1:],
        "segment_ids": torch.zeros_like(rows[:, 1:]),
    }
    return int(label_bytes(batch, torch.from_numpy(count.table), count.byte_space).sum())


def _expected(kind: str, text: str) -> int:
    """Bytes of a document; U+2581 itself is a space to these tokenizers."""
    return len(text.replace("\u2581", " ").encode()) + (kind in PREFIXED and bool(text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_without_a_separate_piece_is_one_byte(
    found: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = found[kind]
    ids = tokenizer.encode("All human 人 beings")
    assert "\u2581" in tokenizer.decode(ids) or kind == "metaspace_decoder"
    assert tokenizer.byte_space() is not None
    first, second, third = tokenizer.byte_space() or (0, 0, 0)
    assert [first, second, third] in [ids[i : i + 3] for i in range(len(ids))]
    assert _sum(tokenizer, [[tokenizer.eod, *ids]]) == len("All human 人 beings".encode()) + (
        kind in PREFIXED
    )


@given(text=samples.texts, kind=st.sampled_from(KINDS))
def test_the_bytes_of_any_document_are_those_of_its_text(
    found: dict[str, Tokenizer], text: str, kind: str
) -> None:
    tokenizer = found[kind]
    ids = tokenizer.encode(text)
    if ids:
        assert _sum(tokenizer, [[tokenizer.eod, *ids]]) == _expected(kind, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 7])
def test_windows_that_cut_spaces_anywhere_add_up_to_the_text(
    found: dict[str, Tokenizer], kind: str, length: int
) -> None:
    tokenizer = found[kind]
    for name in ("en", "zh"):
        texts = _texts(name, 5)
        stream = [token for text in texts for token in (tokenizer.eod, *tokenizer.encode(text))]
        expected = sum(_expected(kind, text) for text in texts)
        for offset in range(min(length, 3)):
            head, rest = stream[: offset + 1], stream[offset:]
            rest += [tokenizer.eod] * (-(len(rest) - 1) % length)
            rows = [rest[at : at + length + 1] for at in range(0, len(rest) - 1, length)]
            assert _sum(tokenizer, rows) + (_sum(tokenizer, [head]) if offset else 0) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5, 64])
def test_packed_pieces_that_cut_spaces_anywhere_add_up_to_the_text(
    found: dict[str, Tokenizer], kind: str, length: int
) -> None:
    tokenizer = found[kind]
    texts = _texts("en", 20)
    documents = DocumentDataset(texts, tokenizer, start=tokenizer.eod, seq_length=length)
    batch = {
        name: torch.from_numpy(a)
        for name, a in documents.read_window(np.arange(documents.num_samples)).items()
    }
    count = TokenBytes.of(tokenizer, tokenizer.vocab_size)
    lengths = (
        label_bytes(batch, torch.from_numpy(count.table), count.byte_space)
        * batch["loss_mask"].long()
    )
    assert int(lengths.sum()) == sum(_expected(kind, text) for text in texts)


def test_other_characters_that_end_in_the_bytes_of_a_space_keep_their_bytes(
    found: dict[str, Tokenizer],
) -> None:
    tokenizer = found["no_prefix"]
    text = "a\u1581b\u4581 \U00016581"  # ends in 96 81 each
    assert _sum(tokenizer, [[tokenizer.eod, *tokenizer.encode(text)]]) == len(text.encode())


def test_vocabularies_with_a_piece_for_the_space_have_no_byte_space(tmp_path: Path) -> None:
    path = samples.write_sentencepiece(tmp_path / "x.model", **PLAIN)
    samples.metaspace_bpe().save(str(tmp_path / "x.json"))
    assert load_tokenizer("SentencePieceTokenizer", tokenizer_model=path).byte_space() is None
    assert (
        load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path / "x.json").byte_space()
        is None
    )


def test_the_forward_step_sums_these_bytes_where_the_mask_is_set(
    found: dict[str, Tokenizer],
) -> None:
    tokenizer = found["no_prefix"]
    ids = [tokenizer.eod, *tokenizer.encode("人 人 人")]
    rows = torch.tensor([ids])
    batch = {
        "tokens": rows[:, :-1],
        "labels": rows[:, 1:],
        "segment_ids": torch.zeros_like(rows[:, 1:]),
        "position_ids": torch.arange(len(ids) - 1)[None],
        "loss_mask": (torch.arange(len(ids) - 1) < len(tokenizer.encode("人 人")))[None].float(),
        "domain": torch.tensor([1]),
    }
    token_bytes = TokenBytes.of(tokenizer, tokenizer.vocab_size)
    step = make_forward_step(2, token_bytes, False, torch.device("cpu"))
    output, loss_function = step(iter([batch]), lambda *_, **__: torch.full((1, len(ids) - 1), 2.0))
    sums = loss_function(output)[2]["sums"]
    tokens = len(tokenizer.encode("人 人"))
    assert sums.tolist() == [[0, 0, 0], [2 * tokens, tokens, len("人 人".encode())]]
