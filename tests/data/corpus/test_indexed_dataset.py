"""`.bin/.idx`, read and written, with megatron-core's reader and builder as the oracle."""

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import indexed_dataset as megatron

from megatron_chatflow.data import (
    IndexedDataset,
    IndexedDatasetBuilder,
    Manifest,
    best_dtype,
    read_manifest,
    write_manifest,
)
from megatron_chatflow.errors import ChatflowError

TOKENS = st.lists(st.integers(0, 2**15 - 1), max_size=5)
DOCUMENTS = st.lists(st.lists(st.tuples(TOKENS, st.integers(0, 1)), max_size=4), max_size=6)
DTYPES = st.sampled_from([np.uint16, np.int32, np.int64])


def write_both(folder, documents, dtype, multimodal):
    ours, theirs = f"{folder}/ours", f"{folder}/theirs"
    builder = megatron.IndexedDatasetBuilder(theirs + ".bin", dtype, multimodal)
    with IndexedDatasetBuilder(ours, dtype, multimodal) as mine:
        for document in documents:
            tokens = [t for sequence, _ in document for t in sequence]
            lengths, modes = [len(s) for s, _ in document], [m for _, m in document]
            mine.add_document(tokens, lengths, modes if multimodal else None)
            builder.add_document(tokens, lengths, modes)
        mine.finalize()
    builder.finalize(theirs + ".idx")
    return ours, theirs


def content(prefix):
    with open(prefix + ".bin", "rb") as tokens, open(prefix + ".idx", "rb") as index:
        return tokens.read(), index.read()


@given(DOCUMENTS, DTYPES, st.booleans())
def test_what_is_written_is_byte_for_byte_what_megatron_writes(
    tmp_path_factory, documents, dtype, multimodal
):
    ours, theirs = write_both(tmp_path_factory.mktemp("both"), documents, dtype, multimodal)
    assert content(ours) == content(theirs)


@given(
    DOCUMENTS.filter(lambda d: any(s for document in d for s, _ in document)), DTYPES, st.booleans()
)
def test_both_readers_read_the_same_from_both_writers(
    tmp_path_factory, documents, dtype, multimodal
):
    sequences = [s for document in documents for s, _ in document]
    for prefix in write_both(tmp_path_factory.mktemp("both"), documents, dtype, multimodal):
        ours, theirs = (
            IndexedDataset(prefix),
            megatron.IndexedDataset(prefix, multimodal=multimodal),
        )
        assert (ours.num_sequences, ours.num_documents, ours.num_tokens) == (
            len(sequences),
            len(documents),
            sum(map(len, sequences)),
        )
        assert ours.dtype == theirs.index.dtype == dtype
        np.testing.assert_array_equal(ours.sequence_lengths, theirs.sequence_lengths)
        np.testing.assert_array_equal(ours.document_indices, theirs.document_indices)
        np.testing.assert_array_equal(ours.sequence_pointers, theirs.index.sequence_pointers)
        for i, sequence in enumerate(sequences):
            found = theirs[i][0] if multimodal else theirs[i]
            assert ours.sequence(i).tolist() == sequence == found.tolist()
        for i, document in enumerate(documents):
            assert ours.document(i).tolist() == [t for s, _ in document for t in s]
        if multimodal:
            assert (
                ours.sequence_modes.tolist()
                == [m for document in documents for _, m in document]
                == theirs.index.sequence_modes.tolist()
            )
        else:
            assert ours.sequence_modes is None


@given(DOCUMENTS, DOCUMENTS, st.booleans())
@settings(max_examples=8)
def test_merging_corpora_writes_what_megatron_writes(tmp_path_factory, first, second, multimodal):
    folder = tmp_path_factory.mktemp("merge")
    parts = []
    for name, documents in (("a", first), ("b", second)):
        (folder / name).mkdir()
        parts += write_both(folder / name, documents, np.uint16, multimodal)[:1]
    builder = megatron.IndexedDatasetBuilder(f"{folder}/theirs.bin", np.uint16, multimodal)
    with IndexedDatasetBuilder(folder / "ours", np.uint16, multimodal) as mine:
        for part in parts:
            mine.add_index(part)
            builder.add_index(part)
        mine.finalize()
    builder.finalize(f"{folder}/theirs.idx")
    assert content(f"{folder}/ours") == content(f"{folder}/theirs")


def test_an_index_written_in_many_pieces_is_the_one_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_chatflow.data.corpus.writer._CHUNK", 3)
    documents = [[([1] * (i % 5), i % 2)] for i in range(20)]
    ours, theirs = write_both(tmp_path, documents, np.int32, True)
    assert content(ours) == content(theirs)


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 65537, 200_000])
def test_the_token_type_follows_megatrons_rule(vocab_size):
    assert best_dtype(vocab_size) is megatron.DType.optimal_dtype(vocab_size)


@given(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=12))
def test_document_boundaries_found_by_bisection_are_those_counted_one_by_one(
    write_numbered, lengths
):
    dataset = IndexedDataset(write_numbered(lengths))
    sizes = [sum(document) for document in lengths]
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    owner = [i for i, size in enumerate(sizes) for _ in range(size)]
    assert dataset.documents_at(np.arange(len(owner))).tolist() == owner
    assert dataset.token_range(0, len(lengths)) == (0, len(owner))
    if dataset.num_sequences:
        assert dataset.document_starts(np.arange(len(lengths) + 1)).tolist() == starts
    for i in range(len(lengths)):
        assert dataset.token_range(i, i + 1) == (starts[i], starts[i + 1])


def test_a_part_of_a_sequence_is_read_alone_and_only_within_it(write_corpus):
    dataset = IndexedDataset(write_corpus([[[5, 6, 7], [8]]]))
    assert dataset.sequence(0, 1).tolist() == [6, 7]
    assert dataset.sequence(0, 1, 1).tolist() == [6]
    for index, offset, length in ((0, 1, 3), (0, 4, None), (0, -1, 1), (2, 0, None), (-1, 0, None)):
        with pytest.raises(IndexError):
            dataset.sequence(index, offset, length)
    with pytest.raises(IndexError):
        dataset.document(1)


@pytest.mark.parametrize(
    ("dtype", "multimodal", "arguments", "named"),
    [
        (np.uint16, False, ([65536], [1]), "65536"),
        (np.uint16, False, ([3, -1], [2]), "-1"),
        (np.int32, False, ([0.5], [1]), "float64"),
        (np.int32, False, ([1, 2], [1]), "lengths"),
        (np.int32, False, ([1], [2, -1]), "lengths"),
        (np.int32, False, ([1], [1], [0]), "multimodal=True"),
        (np.int32, True, ([1], [1], [0, 1]), "2 modes"),
    ],
)
def test_a_document_that_cannot_be_stored_is_refused(tmp_path, dtype, multimodal, arguments, named):
    with (
        IndexedDatasetBuilder(tmp_path / "a", dtype, multimodal) as builder,
        pytest.raises(ChatflowError, match=named),
    ):
        builder.add_document(*arguments)


def test_a_float_type_is_refused(tmp_path):
    with pytest.raises(ChatflowError, match="float32"):
        IndexedDatasetBuilder(tmp_path / "a", np.float32)


def test_corpora_that_do_not_match_are_not_merged(tmp_path, write_corpus):
    text, chat = write_corpus([[[1]]]), write_corpus([[[1]]], [[0]])
    for dtype, multimodal, other, named in (
        (np.uint16, False, text, "int32"),
        (np.int32, True, text, "lacks"),
        (np.int32, False, chat, "has"),
    ):
        with (
            IndexedDatasetBuilder(tmp_path / "a", dtype, multimodal) as builder,
            pytest.raises(ChatflowError, match=named),
        ):
            builder.add_index(other)


def test_nothing_is_left_of_a_corpus_that_was_not_finished(tmp_path):
    with pytest.raises(RuntimeError), IndexedDatasetBuilder(tmp_path / "a", np.int32) as builder:
        builder.add_document([1], [1])
        raise RuntimeError
    assert not os.listdir(tmp_path)


def test_a_new_corpus_takes_the_place_of_an_old_one_with_its_manifest(tmp_path):
    old = Manifest(
        tokenizer={"type": "t", "name": "n", "hash": "h", "vocab_size": 9, "eod": 0},
        dtype="int32",
        documents=1,
        tokens=1,
        bytes=1,
        sources=["x"],
        append_eod=False,
        conversations=False,
    )
    for tokens in ([1], [2, 3]):
        assert read_manifest(tmp_path / "a") is None
        with IndexedDatasetBuilder(tmp_path / "a", np.int32) as builder:
            builder.add_document(tokens, [len(tokens)])
            builder.finalize()
        assert IndexedDataset(tmp_path / "a").tokens.tolist() == tokens
        assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
        if tokens == [1]:
            write_manifest(tmp_path / "a", old)
            os.unlink(tmp_path / "a.json")
    with IndexedDatasetBuilder(tmp_path / "a", np.int32) as builder:
        builder.add_document([4], [1])
        builder.finalize(old)
    assert dataclasses.replace(read_manifest(tmp_path / "a"), crc32=None) == old
    with IndexedDatasetBuilder(tmp_path / "a", np.int32) as builder:
        builder.finalize()
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


@given(DOCUMENTS, DTYPES, st.booleans(), st.data())
@settings(max_examples=30)
def test_documents_added_at_once_are_those_added_one_by_one(
    tmp_path_factory, documents, dtype, multimodal, data
):
    folder = tmp_path_factory.mktemp("bulk")
    ours, _ = write_both(folder, documents, dtype, multimodal)
    cut = data.draw(st.integers(0, len(documents)))
    with IndexedDatasetBuilder(folder / "bulk", dtype, multimodal) as builder:
        for part in (documents[:cut], documents[cut:]):
            sequences = [sequence for document in part for sequence in document]
            tokens = np.array([t for tokens, _ in sequences for t in tokens], np.int64)
            modes = [mode for _, mode in sequences] if multimodal else None
            builder.add_documents(
                tokens,
                [len(tokens) for tokens, _ in sequences],
                [len(document) for document in part],
                modes,
            )
        builder.finalize()
    assert content(f"{folder}/bulk") == content(ours)


@pytest.mark.parametrize(
    ("multimodal", "arguments", "named"),
    [
        (False, ([1, 2], [1], [1]), "sequence lengths add up to 1"),
        (False, ([1], [2, -1], [2]), "sequence lengths add up"),
        (False, ([1], [1], [2]), "numbers of sequences add up to 2"),
        (False, ([70_000], [1], [1]), "70000"),
        (False, ([1], [1], [1], [0]), "multimodal=True"),
    ],
)
def test_documents_that_cannot_be_stored_at_once_are_refused(
    tmp_path, multimodal, arguments, named
):
    with (
        IndexedDatasetBuilder(tmp_path / "a", np.uint16, multimodal) as builder,
        pytest.raises(ChatflowError, match=named),
    ):
        builder.add_documents(*map(np.array, arguments))


def test_own_documents_and_entire_corpora_can_be_mixed(tmp_path, write_corpus):
    other = write_corpus([[[4], [5]], [[6]]], dtype=np.uint16)
    with IndexedDatasetBuilder(tmp_path / "a", np.uint16) as builder:
        builder.add_document([1, 2], [1, 1])
        builder.add_index(other)
        builder.add_document([7], [1])
        builder.add_index(other)
        assert (builder.num_documents, builder.num_sequences, builder.num_tokens) == (6, 9, 9)
        builder.finalize()
    dataset = IndexedDataset(tmp_path / "a")
    assert [dataset.document(i).tolist() for i in range(6)] == [
        [1, 2],
        [4, 5],
        [6],
        [7],
        [4, 5],
        [6],
    ]
