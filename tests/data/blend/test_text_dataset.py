"""The text domain, against a slow reading in plain Python."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.data import IndexedDataset, TextDataset, WindowOptions
from megatron_chatflow.errors import ChatflowError

LENGTHS = st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=12)
SEQ = st.integers(1, 8)


def open_text(prefix, seq_length, documents=None, name="en", seed=1, **settings):
    dataset = IndexedDataset(prefix)
    return TextDataset(
        name,
        dataset,
        documents or (0, dataset.num_documents),
        WindowOptions(seq_length=seq_length, seed=seed, **settings),
    )


def slow_windows(documents, seq_length, reset_position_ids, reset_attention_mask):
    """The windows of a list of documents, position by position."""
    stream = [
        (token, d, i) for d, document in enumerate(documents) for i, token in enumerate(document)
    ]
    for start in range(0, max(len(stream) - 1, 0), seq_length):
        rows = {key: [] for key in ("tokens", "labels", "loss_mask", "position_ids", "segment_ids")}
        segment = position = 0
        for p in range(start, start + seq_length):
            padding = p >= len(stream) - 1
            document_starts = p > start and (
                stream[p][1] != stream[p - 1][1] if not padding else p == len(stream) - 1
            )
            if document_starts and (reset_attention_mask or padding):
                segment += 1
            if p > start:
                position = 0 if document_starts and reset_position_ids else position + 1
            rows["tokens"].append(0 if padding else stream[p][0])
            rows["labels"].append(0 if padding else stream[p + 1][0])
            rows["loss_mask"].append(0.0 if padding else 1.0)
            rows["position_ids"].append(position)
            rows["segment_ids"].append(segment)
        yield rows


@given(LENGTHS, SEQ, st.booleans(), st.booleans(), st.data())
def test_windows_are_those_read_position_by_position(
    write_numbered, lengths, seq_length, positions, attention, data
):
    prefix = write_numbered(lengths)
    begin = data.draw(st.integers(0, len(lengths)))
    end = data.draw(st.integers(begin, len(lengths)))
    domain = open_text(
        prefix,
        seq_length,
        (begin, end),
        reset_position_ids=positions,
        reset_attention_mask=attention,
    )
    documents = [domain.dataset.document(d).tolist() for d in range(begin, end)]
    expected = list(slow_windows(documents, seq_length, positions, attention))
    assert domain.num_samples == len(expected)
    batch = domain.read_window(np.arange(domain.num_samples))
    for key, dtype in {
        "tokens": "i8",
        "labels": "i8",
        "loss_mask": "f4",
        "position_ids": "i8",
        "segment_ids": "i4",
    }.items():
        assert batch[key].dtype == dtype and batch[key].shape == (len(expected), seq_length)
        assert batch[key].tolist() == [rows[key] for rows in expected], key


@given(LENGTHS, SEQ, st.integers(0, 10**9))
def test_every_token_but_the_first_is_a_label_once_an_epoch(
    write_numbered, lengths, seq_length, epoch
):
    domain = open_text(write_numbered(lengths), seq_length)
    batch = domain.read(epoch * domain.num_samples + np.arange(domain.num_samples))
    assert sorted(batch["labels"][batch["loss_mask"] == 1].tolist()) == list(
        range(1, domain.dataset.num_tokens)
    )
    assert np.array_equal(
        batch["labels"][batch["loss_mask"] == 1], batch["tokens"][batch["loss_mask"] == 1] + 1
    )


@given(LENGTHS, SEQ)
def test_provenance_names_the_tokens_of_a_sample(write_numbered, lengths, seq_length):
    domain = open_text(write_numbered(lengths), seq_length)
    for ordinal in range(2 * domain.num_samples):
        batch, where = domain.read(np.array([ordinal])), domain.provenance(ordinal)
        real = batch["loss_mask"][0] == 1
        read = batch["tokens"][0][real].tolist() + batch["labels"][0][real][-1:].tolist()
        assert [
            t
            for d, start, stop in where["documents"]
            for t in domain.dataset.document(d)[start:stop].tolist()
        ] == read
        assert all(start < stop for _, start, stop in where["documents"])
        assert where["epoch"] == ordinal // domain.num_samples


def test_the_order_depends_on_seed_name_and_epoch_alone(write_numbered):
    prefix, moved = write_numbered([[400]]), write_numbered([[3], [397]])
    order = open_text(prefix, 4).window_of(np.arange(300)).tolist()
    assert open_text(moved, 4).window_of(np.arange(300)).tolist() == order
    assert open_text(prefix, 4, name="zh").window_of(np.arange(300)).tolist() != order
    assert open_text(prefix, 4, seed=2).window_of(np.arange(300)).tolist() != order
    assert order[100:200] != order[:100] and sorted(order[100:200]) == sorted(order[:100]) == list(
        range(100)
    )


def test_the_loss_is_masked_where_the_token_ends_a_document(write_corpus):
    domain = open_text(
        write_corpus([[[5, 9]], [[6, 7, 9]], [[8, 9]]]), 4, eod_mask_loss=True, eod=9
    )
    batch = domain.read_window(np.arange(2))
    assert batch["tokens"].tolist() == [[5, 9, 6, 7], [9, 8, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 0, 1, 1], [0, 1, 0, 0]]


def test_masking_the_end_of_documents_needs_the_token(write_numbered):
    with pytest.raises(ChatflowError, match="eod_mask_loss"):
        open_text(write_numbered([[9]]), 4, eod_mask_loss=True)


def test_a_window_that_does_not_exist_is_refused(write_numbered):
    domain = open_text(write_numbered([[9]]), 4)
    for window in (-1, 2):
        with pytest.raises(IndexError, match="en"):
            domain.read_window(np.array([window]))


@pytest.mark.parametrize("lengths", [[[]], [[0]], [[1]], [[], [1], []]])
def test_a_corpus_without_a_label_has_no_windows(write_numbered, lengths):
    domain = open_text(write_numbered(lengths), 4)
    assert domain.num_samples == 0
    assert domain.read_window(np.arange(0))["tokens"].shape == (0, 4)


def test_sequences_that_are_not_stored_in_order_are_refused(write_numbered):
    prefix = write_numbered([[2], [3]])
    with open(prefix + ".idx", "r+b") as file:
        file.seek(34)
        file.write(struct.pack("<iiqq", 3, 2, 8, 0))
    with pytest.raises(ChatflowError, match="verify") as caught:
        open_text(prefix, 4)
    assert prefix in str(caught.value)


def test_a_domain_that_has_read_can_be_pickled(write_numbered):
    domain = open_text(write_numbered([[4000]]), 8)
    before = domain.read(np.arange(5))["tokens"]
    data = pickle.dumps(domain)
    assert len(data) < 2000
    assert np.array_equal(pickle.loads(data).read(np.arange(5))["tokens"], before)


def test_small_token_types_are_widened(write_corpus):
    domain = open_text(write_corpus([[[65535, 65534, 65533]]], dtype=np.uint16), 2)
    assert domain.read_window(np.array([0]))["labels"].tolist() == [[65534, 65533]]


def test_many_windows_at_once_are_those_read_one_by_one(write_corpus):
    document = np.random.default_rng(3).integers(0, 1000, 300).tolist()
    domain = open_text(
        write_corpus([[document]] * 500), 1000, reset_position_ids=True, reset_attention_mask=True
    )
    windows = np.random.default_rng(4).permutation(domain.num_samples)
    together = domain.read_window(np.concatenate([windows, windows]))
    for row, window in enumerate(np.concatenate([windows, windows])):
        for key, value in domain.read_window(np.array([window])).items():
            assert np.array_equal(together[key][row], value[0])
