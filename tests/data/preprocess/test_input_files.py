"""What `preprocess` reads."""

import gzip
import hashlib
import io
import itertools
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_chatflow.data.chat.templates import MalformedRecord
from megatron_chatflow.data.preprocess import parquet
from megatron_chatflow.data.preprocess.input_files import Chunk, InputSource, open_sources
from megatron_chatflow.data.preprocess.json_array import is_array
from megatron_chatflow.data.preprocess.records import all_records, each_record
from megatron_chatflow.errors import ChatflowError, DataError
from tests.data.preprocess.samples import write_table

COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
ROOT = Path(__file__).resolve().parents[3]
NOISE = bytes(i * i * 7 % 251 for i in range(5000))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    size=st.integers(1, 40),
    suffix=st.sampled_from(sorted(COMPRESSIONS)),
)
def test_chunks_are_complete_lines_with_their_numbers_in_order(tmp_path, lines, size, suffix):
    content = b"\n".join(lines)
    if content[:2] == b"\x1f\x8b" or is_array(content.removeprefix(b"\xef\xbb\xbf")):
        return
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](content))
    source = InputSource(str(path))
    chunks = list(source.chunks(size))
    assert b"".join(chunk.data for chunk in chunks) == content.removeprefix(b"\xef\xbb\xbf")
    assert all(chunk.data.endswith(b"\n") for chunk in chunks[:-1])
    number = 1
    for chunk in chunks:
        assert chunk.first == number
        number = chunk.next
        assert chunk.next - chunk.first == len(chunk.data.splitlines()) or any(
            c in chunk.data for c in b"\r"
        )
    assert source.stored_bytes == source.size
    assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len({chunk.checksum for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_members_or_frames_are_one_text(tmp_path, suffix):
    path = tmp_path / "without ending"
    path.write_bytes(b"".join(map(COMPRESSIONS[suffix], (b"a\nb", b"", b"c\n"))))
    assert b"".join(chunk.data for chunk in InputSource(str(path)).chunks(100)) == b"a\nbc\n"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data[:50] + bytes(10) + data[60:],
        lambda data: data + b"garbage",
    ],
)
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix, damage):
    path = tmp_path / f"a.jsonl{suffix}"
    compress = (
        gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    )
    path.write_bytes(damage(compress(NOISE)))
    with pytest.raises(
        ChatflowError,
        match=r"a\.jsonl\..* cannot be read to its end .*: the file is damaged or was cut off",
    ):
        list(InputSource(str(path)).chunks(1000))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.jsonl", "jsonl"),
        ("a.JSON", "jsonl"),
        ("a", "jsonl"),
        ("a.txt", "text"),
        ("a.TXT.gz", "text"),
        ("a.txt.zst", "text"),
    ],
)
def test_the_format_follows_from_the_name_unless_it_is_given(tmp_path, name, format):
    (tmp_path / name).touch()
    assert InputSource(str(tmp_path / name)).format == format
    assert {InputSource(str(tmp_path / name), given).format for given in ("jsonl", "text")} == {
        "jsonl",
        "text",
    }


def test_patterns_give_their_files_by_name_and_everything_else_keeps_its_place(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "z.jsonl", "odd[1].jsonl", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = open_sources(
        [
            str(tmp_path / "z.jsonl"),
            str(tmp_path / "[ab].jsonl"),
            str(tmp_path / "odd[1].jsonl"),
            str(tmp_path / "d*" / "*"),
            "-",
        ]
    )
    assert [source.name for source in found] == [
        "z.jsonl",
        "a.jsonl",
        "b.jsonl",
        "odd[1].jsonl",
        "c.jsonl",
        "standard input",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "cannot be read .No such file or directory.: check the path"),
        ("*.none", "matches no file: check the pattern"),
        ("", "is a folder: name files, or a pattern"),
        ("a.parquet", "is not a parquet file .*: check the path, or give --input-format"),
        (
            "a.jsonl.xz",
            r"\.xz files are not read: unpack it into the standard input: xz -dc .*a\.jsonl\.xz",
        ),
        ("a.tar.gz", r"\.tar files are not read: unpack it first"),
    ],
)
def test_an_unreadable_input_is_refused_with_the_fix(tmp_path, name, message):
    for existing in ("a.parquet", "a.jsonl.xz", "a.tar.gz"):
        (tmp_path / existing).write_bytes(NOISE)
    with pytest.raises(ChatflowError, match=message):
        open_sources([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("name", "library"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_a_missing_library_is_one_message_with_the_fix(tmp_path, monkeypatch, name, library):
    (tmp_path / name).touch()
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ChatflowError, match=rf"{name}.*: pip install {library}, or "):
        open_sources([str(tmp_path / name)])


def test_parquet_is_not_read_from_the_standard_input():
    with pytest.raises(ChatflowError, match="--input - cannot be parquet"):
        InputSource("-", "parquet")


def test_a_file_named_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(
        ChatflowError, match=r"--input names .*a\.jsonl 2 times: name each file once"
    ):
        open_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])


@pytest.mark.parametrize(("size", "row_group_size"), [(1, 7), (300, 7), (300, 1000), (10**6, 1000)])
def test_rows_of_a_table_are_records_in_order(tmp_path, size, row_group_size):
    rows = [
        {"text": f"{i} é 你好", "n": i, "none": None, "turns": [{"role": "user"}]}
        for i in range(50)
    ]
    path = tmp_path / "a.parquet"
    write_table(path, rows, row_group_size)
    source = InputSource(str(path))
    chunks = list(source.chunks(size))
    assert (
        list(itertools.chain.from_iterable(parquet.records(chunk.data) for chunk in chunks)) == rows
    )
    assert [chunk.first for chunk in chunks] == [
        1,
        *(chunk.next for chunk in chunks[:-1]),
    ] and chunks[-1].next == 51
    assert chunks[-1].position == source.stored_bytes == source.size
    assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert parquet.records(next(source.chunks(size, ["n"])).data)[0] == {"n": 0}


def test_a_table_without_the_column_is_refused_with_those_it_has(tmp_path):
    write_table(tmp_path / "a.parquet", [{"body": "a", "title": "b"}])
    with pytest.raises(ChatflowError, match=r"a\.parquet has no column 'text': it has body, title"):
        list(InputSource(str(tmp_path / "a.parquet")).chunks(1000, ["text"]))


def test_a_damaged_table_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(path, [{"text": str(i * i)} for i in range(5000)])
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(
        ChatflowError,
        match=r"a\.parquet cannot be read to its end .*: the file is damaged or was cut off",
    ):
        list(InputSource(str(path)).chunks(1000))


def test_a_text_in_a_table_that_is_not_utf_8_is_named_by_its_row(tmp_path):
    column = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (chunk,) = InputSource(str(tmp_path / "a.parquet")).chunks(1000)
    with pytest.raises(UnicodeDecodeError):
        all_records(chunk.data, "parquet")
    (_, first), (number, error), (_, last) = each_record(chunk)
    assert (first, last) == ({"text": "a"}, {"text": "c"})
    assert number == 2 and str(error) == "not UTF-8 (invalid start byte)"


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [
                b'{"text": "a"}',
                b'{"text": "\xc3\xa9", "n": [1]}',
                b" ",
                b"",
                b"\r",
                b'{"text": "b"}\r',
                b' {"text": 1} ',
            ]
        )
        | st.sampled_from(
            [
                b"nonsense",
                b'{"text": "a"},',
                b"[1]",
                b"\xff",
                b'{"a": [1',
                b"2]}",
                b"\xef\xbb\xbf{}",
                b'{"text": "\r"}',
                b"\x0c",
            ]
        )
        | st.binary(max_size=5),
        max_size=6,
    ),
    st.sampled_from(["jsonl", "text"]),
)
def test_reading_all_records_at_once_gives_what_reading_each_gives(lines, format):
    data = b"\n".join(lines)
    slow = [record for _, record in each_record(Chunk(1, 1, data, format, 0, ""))]
    try:
        fast = all_records(data, format)
    except (DataError, ValueError, RecursionError):
        return
    assert repr(fast) == repr(slow) or any(
        isinstance(record, MalformedRecord) and "not an object" in str(record) for record in slow
    )


def test_the_standard_input_is_read_as_files_are(monkeypatch, tmp_path):
    (tmp_path / "a.zst").write_bytes(zstandard.compress(b"a\nb\n"))
    with open(tmp_path / "a.zst", "rb") as file:
        monkeypatch.setattr(
            "builtins.open",
            lambda path, *_, **__: io.FileIO(file.fileno(), closefd=False) if path == 0 else None,
        )
        assert [chunk.data for chunk in InputSource("-").chunks(100)] == [b"a\nb\n"]


def test_a_pipe_that_gives_a_byte_at_a_time_is_read_as_any_other(monkeypatch):
    class Slow(io.BytesIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:1])

    monkeypatch.setattr("builtins.open", lambda *_, **__: Slow(gzip.compress(b"a\nb\n")))
    assert [chunk.data for chunk in InputSource("-").chunks(100)] == [b"a\nb\n"]
