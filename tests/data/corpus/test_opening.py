"""Opening a corpus: what is refused, memory maps, and the fingerprint."""

import gc
import os
import pickle
import shutil
import struct

import numpy as np
import pytest

from megatron_chatflow.data import (
    IndexedDataset,
    IndexedDatasetBuilder,
)
from megatron_chatflow.errors import ChatflowError


@pytest.fixture
def corpus(tmp_path, write_corpus):
    source = write_corpus([[[1, 2, 3]], [[4], [5, 6]]], dtype=np.uint16)
    for suffix in (".bin", ".idx"):
        shutil.copy(source + suffix, tmp_path / f"a{suffix}")
    return str(tmp_path / "a")


def assert_refused(prefix, *named):
    with pytest.raises(ChatflowError) as caught:
        IndexedDataset(prefix)
    assert "\n" not in str(caught.value)
    for part in (prefix, *named):
        assert part in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(corpus, suffix):
    os.unlink(corpus + suffix)
    assert_refused(corpus, f"a{suffix} does not exist")


def test_a_prefix_with_its_ending_gets_the_fix(corpus):
    assert_refused(corpus + ".bin", f"write {corpus},")


def test_a_file_cut_anywhere_is_refused(corpus):
    for suffix in (".bin", ".idx"):
        with open(corpus + suffix, "rb") as file:
            stored = file.read()
        for length in range(len(stored)):
            with open(corpus + suffix, "wb") as file:
                file.write(stored[:length])
            assert_refused(corpus)
        with open(corpus + suffix, "wb") as file:
            file.write(stored)
    assert IndexedDataset(corpus).num_tokens == 6


@pytest.mark.parametrize(
    ("offset", "value", "named"),
    [
        (0, b"X", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "type code 7"),
        (17, b"\x04", "truncated or belongs to another index"),
        (18, struct.pack("<Q", 2**62), "bytes where its header"),
        (26, struct.pack("<Q", 0), "bytes where its header"),
        (34 + 12 * 3, struct.pack("<q", 1), "do not run from sequence 0"),
        (34 + 12 * 3 + 16, struct.pack("<q", 9), "do not run from sequence 0"),
    ],
)
def test_a_damaged_header_is_refused(corpus, offset, value, named):
    with open(corpus + ".idx", "r+b") as file:
        file.seek(offset)
        file.write(value)
    assert_refused(corpus, named)


def test_open_corpora_hold_no_open_files(corpus):
    before = len(os.listdir("/proc/self/fd"))
    datasets = [IndexedDataset(corpus) for _ in range(50)]
    assert all(d.tokens.sum() == 21 and d.sequence_lengths.sum() == 6 for d in datasets)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_map_lives_as_long_as_a_view_of_it(corpus):
    def mapped():
        gc.collect()
        with open("/proc/self/maps") as file:
            return sum(corpus in line for line in file)

    dataset = IndexedDataset(corpus)
    assert mapped() == 0
    view = dataset.tokens[2:4]
    del dataset
    assert mapped() == 1 and view.tolist() == [3, 4]
    del view
    assert mapped() == 0


def test_the_maps_are_read_only(corpus):
    with pytest.raises(ValueError):
        IndexedDataset(corpus).tokens[0] = 1


def test_a_dataset_is_pickled_as_its_path(corpus):
    dataset = IndexedDataset(corpus)
    assert dataset.tokens.sum() == 21
    assert len(pickle.dumps(dataset)) < 500
    assert pickle.loads(pickle.dumps(dataset)).document(1).tolist() == [4, 5, 6]


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(corpus, tmp_path):
    fingerprint = IndexedDataset(corpus).fingerprint()
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus + suffix, tmp_path / f"b{suffix}")
    other = str(tmp_path / "b")
    assert IndexedDataset(other).fingerprint() == fingerprint
    for suffix, offset in ((".bin", 0), (".bin", 11), (".idx", 34), (".idx", 34 + 12 * 3 + 8)):
        with open(other + suffix, "r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
            file.flush()
            assert IndexedDataset(other).fingerprint() != fingerprint
            file.seek(offset)
            file.write(bytes([byte]))
    assert IndexedDataset(other).fingerprint() == fingerprint


def test_the_fingerprint_of_a_large_corpus_sees_both_ends(tmp_path):
    found = set()
    for changed in (None, 0, -1):
        tokens = np.arange(20_000) % 1000
        if changed is not None:
            tokens[changed] += 1
        with IndexedDatasetBuilder(tmp_path / "a", np.uint16) as builder:
            builder.add_document(tokens, [20_000])
            builder.finalize()
        found.add(IndexedDataset(tmp_path / "a").fingerprint())
    assert len(found) == 3
