"""The limit of a record, the memory that input takes, and pipes."""

import gzip
import io
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_chatflow.data.preprocess import parquet
from megatron_chatflow.data.preprocess.input_files import InputSource, open_sources
from megatron_chatflow.errors import ChatflowError
from tests.data.preprocess.samples import write_table

COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
ROOT = Path(__file__).resolve().parents[3]
NOISE = bytes(i * i * 7 % 251 for i in range(5000))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 60), max_size=20),
    limit=st.integers(1, 50),
    size=st.integers(3, 40),
    last=st.booleans(),
)
def test_lines_beyond_the_limit_are_chunks_of_their_own_and_the_others_stay(
    tmp_path, lengths, limit, size, last
):
    lines = [bytes([97 + number % 26]) * length for number, length in enumerate(lengths)]
    path = tmp_path / "a.jsonl"
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(content if last else content[:-1])
    number, kept, long = 1, [], []
    for chunk in InputSource(str(path), limit=limit).chunks(size):
        assert chunk.first == number
        number = chunk.next
        if chunk.too_long:
            assert chunk.too_long == f"longer than {limit} bytes" and chunk.data == b""
            long.append(chunk.first)
        else:
            kept.extend(bytes(chunk.data).removesuffix(b"\n").split(b"\n"))
    assert long == [number for number, line in enumerate(lines, 1) if len(line) > limit]
    if lines and not last and not lines[-1]:
        lines.pop()  # an empty last line without its end is none
    assert kept == [line for line in lines if len(line) <= limit]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_line_without_an_end_is_known_after_the_limit(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](b"ab\n" + bytes(11 + i % 240 for i in range(3_000_000))))
    source = InputSource(str(path), limit=100_000)
    chunks = source.chunks(1 << 14)
    assert next(chunks).data == b"ab\n"
    assert next(chunks).too_long and (suffix or source.stored_bytes < 200_000)


BOMB = """
import sys, resource
from megatron_chatflow.data.preprocess.input_files import InputSource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chunks = InputSource(sys.argv[1], limit=int(sys.argv[2])).chunks(1 << 18, None)
count = sum(chunk.next - chunk.first for chunk in chunks)
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _read_elsewhere(path, limit: int) -> tuple[int, int]:
    """Read a file in a separate process; returns records and kB of memory."""
    command = [sys.executable, "-c", BOMB, path, str(limit)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    count, memory = map(int, output.split())
    return count, memory


def _packed_zeros(suffix: str, size: int, begin: bytes = b"") -> bytes:
    block = bytes(1 << 20)
    blocks = itertools.chain([begin], itertools.repeat(block, size >> 20))
    if suffix == ".gz":
        content = io.BytesIO()
        with gzip.GzipFile(fileobj=content, mode="wb", compresslevel=1) as file:
            for piece in blocks:
                file.write(piece)
        return content.getvalue()
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join([*map(packer.compress, blocks), packer.flush()])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("begin", "end"), [(b"{", b"\n"), (b"[1,", b"]"), (b'[1,{"text": "', b'"}]')]
)
def test_a_bomb_takes_memory_of_the_limit(tmp_path, suffix, begin, end):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(_packed_zeros(suffix, 64 << 20, begin) + COMPRESSIONS[suffix](end))
    count, memory = _read_elsewhere(path, 8 << 20)
    assert count == (1 if begin == b"{" else 2) and memory < 60_000


def test_a_table_of_one_long_text_again_and_again_takes_memory_of_few_rows(tmp_path):
    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(600, np.int32)), pyarrow.array(["x" * (1 << 20)])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    count, memory = _read_elsewhere(tmp_path / "a.parquet", 8 << 20)
    assert count == 600 and memory < 200_000


def test_rows_beyond_the_limit_are_chunks_of_their_own(tmp_path):
    rows = [
        {"text": "a" * n, "turns": [{"content": "b" * m}]}
        for n, m in ((5, 5), (500, 5), (5, 500), (6, 6))
    ]
    write_table(tmp_path / "a.parquet", rows)
    chunks = list(InputSource(str(tmp_path / "a.parquet"), limit=300).chunks(1000))
    assert [(chunk.first, chunk.next, bool(chunk.too_long)) for chunk in chunks] == [
        (1, 2, False),
        (2, 3, True),
        (3, 4, True),
        (4, 5, False),
    ]
    assert parquet.records(chunks[3].data) == rows[3:]
    texts = [
        bool(chunk.too_long)
        for chunk in InputSource(str(tmp_path / "a.parquet"), limit=300).chunks(1000, ["text"])
    ]
    assert texts == [False, True, False, False]


def test_a_zstandard_window_beyond_the_usual_limit_is_refused_with_what_to_do(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(b"ab\n") + packer.flush())
    message = (
        r"a\.jsonl\.zst was packed with a window of 268,435,456 bytes, more than .*: unpack it "
        r".*zstd -dc --long=31"
    )
    with pytest.raises(ChatflowError, match=message):
        list(InputSource(str(tmp_path / "a.jsonl.zst")).chunks(100))


def test_white_space_without_end_is_not_held(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b" \n" * 2_000_000 + b"{}\n")
    assert (
        sum(bytes(chunk.data).count(b"\n") for chunk in InputSource(str(path)).chunks(1 << 14))
        == 2_000_001
    )


def _write_later(path, content: bytes) -> threading.Thread:
    def write() -> None:
        with open(path, "wb") as pipe:
            pipe.write(content)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


@pytest.mark.parametrize("pack", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_a_named_pipe_is_opened_once_and_read_to_its_end(tmp_path, pack):
    os.mkfifo(tmp_path / "pipe")
    (source,) = open_sources([str(tmp_path / "pipe")])
    assert (source.size, source.modified, source.name) == (None, None, str(tmp_path / "pipe"))
    content = b"".join(b"%d\n" % number for number in range(100_000))
    writer = _write_later(tmp_path / "pipe", pack(content))
    assert b"".join(chunk.data for chunk in source.chunks(1 << 14)) == content
    writer.join(10)


def test_pipes_are_refused_where_they_cannot_be_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.parquet")
    os.symlink("pipe.parquet", tmp_path / "same")
    with pytest.raises(
        ChatflowError, match="is a pipe and cannot be parquet, which is not read from start to end"
    ):
        open_sources([str(tmp_path / "pipe.parquet")])
    with pytest.raises(
        ChatflowError, match=r"names one pipe twice, as .*pipe\.parquet and .*same: name it once"
    ):
        open_sources([str(tmp_path / "pipe.parquet"), str(tmp_path / "same")], "jsonl")
