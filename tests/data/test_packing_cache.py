"""Packings kept beside the corpus."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.data import IndexedDataset, InstructDomain, packing_cache
from megatron_chatflow.data.packing import pack
from megatron_chatflow.data.packing_cache import cached_pack

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = np.random.default_rng(1).integers(0, 40, 300)


def same(first, second):
    return (
        np.array_equal(first.order, second.order)
        and np.array_equal(first.starts, second.starts)
        and (first.num_cut, first.num_skipped) == (second.num_cut, second.num_skipped)
    )


@settings(max_examples=40)
@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 50))
def test_a_packing_read_from_its_file_is_the_one_that_was_made(tmp_path_factory, lengths, seq_length):
    prefix = str(tmp_path_factory.mktemp("cache") / "a")
    lengths = np.array(lengths, np.int64)
    made, read = cached_pack(prefix, lengths, seq_length), cached_pack(prefix, lengths, seq_length)
    assert same(made, pack(lengths, seq_length)) and same(read, made)
    assert read.order.dtype == made.order.dtype and len(os.listdir(os.path.dirname(prefix))) == 1


def test_a_file_that_is_there_is_read_and_not_packed_again(tmp_path, monkeypatch):
    made = cached_pack(str(tmp_path / "a"), LENGTHS, 64)
    monkeypatch.setattr(packing_cache, "pack", None)
    assert same(cached_pack(str(tmp_path / "a"), LENGTHS, 64), made)


def test_other_lengths_and_another_sequence_length_have_files_of_their_own(tmp_path):
    changed = LENGTHS.copy()
    changed[[3, 4]] = changed[[4, 3]] + [1, -1]
    for lengths, seq_length in ((LENGTHS, 64), (LENGTHS, 65), (changed, 64), (LENGTHS[1:], 64)):
        assert same(cached_pack(str(tmp_path / "a"), lengths, seq_length), pack(lengths, seq_length))
    assert len(os.listdir(tmp_path)) == 4


def test_a_file_under_the_name_of_another_is_not_believed(tmp_path):
    cached_pack(str(tmp_path / "a"), LENGTHS, 64)
    (name,) = os.listdir(tmp_path)
    shutil.copy(tmp_path / name, tmp_path / name.replace("-64", "-63"))
    assert same(cached_pack(str(tmp_path / "a"), LENGTHS, 63), pack(LENGTHS, 63))


def test_a_copied_corpus_keeps_its_packing(tmp_path, monkeypatch):
    made = cached_pack(str(tmp_path / "a"), LENGTHS, 64)
    (name,) = os.listdir(tmp_path)
    shutil.copy(tmp_path / name, tmp_path / name.replace("a.", "b."))
    monkeypatch.setattr(packing_cache, "pack", None)
    assert same(cached_pack(str(tmp_path / "b"), LENGTHS, 64), made)


@pytest.mark.parametrize("what", ["a folder that does not exist", "a folder in the place of the file"])
def test_where_nothing_can_be_written_one_warning_says_so_and_the_packing_is_the_same(tmp_path, what):
    prefix = str(tmp_path / "missing" / "a")
    if "in the place" in what:
        prefix = str(tmp_path / "a")
        os.mkdir(packing_cache.cache_path(prefix, LENGTHS, 64))
    with pytest.warns(UserWarning, match="cannot be kept beside it") as caught:
        packing = cached_pack(prefix, LENGTHS, 64)
    assert same(packing, pack(LENGTHS, 64)) and len(caught) == 1 and prefix in str(caught[0].message)
    assert not [name for _, _, names in os.walk(tmp_path) for name in names]


def test_a_domain_opens_without_a_word_where_the_folder_can_be_written(write_numbered):
    prefix = write_numbered([[3, 4], [5, 2], [9]], [[1, 0], [1, 0], [0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        domains = [InstructDomain("chat", IndexedDataset(prefix), seq_length=8, seed=1, documents=(0, 3)) for _ in range(2)]
    assert same(domains[0].packing, domains[1].packing)


def test_many_processes_at_once_write_and_read_one_file(tmp_path):
    code = f"""
        import sys
        import numpy as np
        from megatron_chatflow.data.packing import pack
        from megatron_chatflow.data.packing_cache import cached_pack
        lengths = np.random.default_rng(1).integers(0, 400, 20_000)
        expected = pack(lengths, 512)
        sys.stdin.read()
        packing = cached_pack({str(tmp_path / "a")!r}, lengths, 512)
        assert np.array_equal(packing.order, expected.order) and np.array_equal(packing.starts, expected.starts)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdin=subprocess.PIPE, env=environment) for _ in range(6)]
    for process in processes:
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0] * 6
    assert len(os.listdir(tmp_path)) == 1
