"""Files of `torch.save` beyond 4 GiB, which have 64-bit sizes and places; they are sparse, so they
take no room.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_chatflow.serialization.torch_file import read_torch_file

ELEMENTS = (1 << 30) + 16


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch's own writer: a small tensor, one of more than 4 GiB, and two behind it; all
    bytes of them zero.
    """
    path = tmp_path_factory.mktemp("large") / "large.pt"
    big = torch.empty(ELEMENTS)
    with torch.serialization.skip_data():
        torch.save(
            {
                "a": torch.empty(3),
                "big": big,
                "part": big[-5:],
                "b": torch.empty(5, dtype=torch.int64),
                "c": torch.empty(0),
            },
            path,
        )
    status = path.stat()
    assert status.st_size > 1 << 32 and status.st_blocks * 512 < 1 << 20
    return path


def mapped(path: Path) -> torch.Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def test_tensors_of_four_gigabytes_and_behind_are_read_as_torch_reads_them(large: Path) -> None:
    found, expected = (
        read_torch_file(mapped(large)),
        torch.load(large, mmap=True, weights_only=True),
    )
    for name in ("a", "big", "part", "b", "c"):
        mine, theirs = found[name], expected[name]
        assert (mine.shape, mine.dtype, mine.stride()) == (
            theirs.shape,
            theirs.dtype,
            theirs.stride(),
        )
        if len(mine):
            assert (
                mine.data_ptr() - found["a"].data_ptr()
                == theirs.data_ptr() - expected["a"].data_ptr()
            )
    assert found["big"].shape == (ELEMENTS,)
    found["big"][-1], found["b"][4] = 3.5, 7  # a private map: nothing is written
    assert found["part"].tolist() == [0, 0, 0, 0, 3.5]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tail, at: tail.__setitem__(slice(at, at + 4), b"PK\6\7"), "the end is damaged"),
        (
            lambda tail, at: tail.__setitem__(slice(at + 40, at + 48), struct.pack("<Q", 1 << 33)),
            "table of members is damaged",
        ),
        (
            lambda tail, at: tail.__setitem__(
                slice(at + 48, at + 56), struct.pack("<Q", (1 << 64) - 1)
            ),
            "table of members is damaged",
        ),
        (
            lambda tail, at: tail.__setitem__(slice(at + 32, at + 40), struct.pack("<Q", 1 << 40)),
            "table of members is damaged",
        ),
        (
            lambda tail, at: tail.__setitem__(
                slice(at + 56 + 8, at + 56 + 16), struct.pack("<Q", 1 << 60)
            ),
            "the end is damaged",
        ),
    ],
)
def test_damaged_64_bit_ends_are_refused(
    large: Path, tmp_path: Path, change: Callable[[bytearray, int], None], reason: str
) -> None:
    refused(with_tail(large, tmp_path, lambda tail: change(tail, tail.rindex(b"PK\6\6"))), reason)


def test_a_member_without_its_64_bit_size_is_refused(large: Path, tmp_path: Path) -> None:
    def forget(tail: bytearray) -> None:
        at = tail.index(struct.pack("<HHQQ", 1, 16, ELEMENTS * 4, ELEMENTS * 4))
        tail[at : at + 2] = b"\x09\x09"  # an extra field of another kind

    refused(with_tail(large, tmp_path, forget), "its size is missing")


def with_tail(large: Path, folder: Path, change: Callable[[bytearray], None]) -> Path:
    """A sparse copy of the file with other last bytes."""
    size, kept = large.stat().st_size, 4096
    path = folder / "changed.pt"
    with open(large, "rb") as source, open(path, "wb") as copy:
        copy.write(source.read(kept))
        source.seek(size - kept)
        tail = bytearray(source.read())
        change(tail)
        copy.seek(size - kept)
        copy.write(tail)
    assert os.stat(path).st_blocks * 512 < 1 << 20
    return path


def refused(path: Path, reason: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=reason):
        read_torch_file(mapped(path))
