"""What `preprocess` reads."""

import gzip
import hashlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_chatflow.data.formats import Source, open_sources


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=30), size=st.integers(1, 40), zipped=st.booleans())
def test_chunks_are_whole_lines_with_their_numbers_in_order(tmp_path, lines, size, zipped):
    content = b"\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(content) if zipped else content)
    if not zipped and content[:2] == b"\x1f\x8b":
        return
    source = Source(str(tmp_path / "a.jsonl"))
    chunks = list(source.chunks(size))
    assert b"".join(chunk.data for chunk in chunks) == content.removeprefix(b"\xef\xbb\xbf")
    assert all(chunk.data.endswith(b"\n") for chunk in chunks[:-1])
    number = 1
    for chunk in chunks:
        assert chunk.first_line == number
        number += chunk.data.count(b"\n")
    assert source.stored_bytes == source.size
    assert source.sha256() == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()


def test_several_gzip_members_are_one_text(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"c\n"))
    assert b"".join(chunk.data for chunk in Source(str(tmp_path / "a.gz")).chunks(100)) == b"a\nbc\n"


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:50] + bytes(10) + data[60:], lambda data: data + b"garbage"])
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(bytes(i * 7 % 251 for i in range(5000)))))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read to its end .*: the file is damaged or was cut off"):
        list(Source(str(tmp_path / "a.jsonl.gz")).chunks(1000))


@pytest.mark.parametrize(("name", "format"), [("a.jsonl", "jsonl"), ("a.JSON", "jsonl"), ("a", "jsonl"), ("a.txt", "text"), ("a.TXT.gz", "text")])
def test_the_name_tells_the_format_unless_it_is_given(tmp_path, name, format):
    (tmp_path / name).touch()
    assert Source(str(tmp_path / name)).format == format
    assert {Source(str(tmp_path / name), given).format for given in ("jsonl", "text")} == {"jsonl", "text"}


def test_patterns_give_their_files_by_name_and_everything_else_keeps_its_place(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "z.jsonl", "odd[1].jsonl", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = open_sources([str(tmp_path / "z.jsonl"), str(tmp_path / "[ab].jsonl"), str(tmp_path / "odd[1].jsonl"), str(tmp_path / "d*" / "*"), "-"])
    assert [source.name for source in found] == ["z.jsonl", "a.jsonl", "b.jsonl", "odd[1].jsonl", "c.jsonl", "standard input"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "cannot be read .No such file or directory.: check the path"),
        ("*.none", "matches no file: check the pattern"),
        ("", "is a folder: name files, or a pattern"),
        ("a.parquet", r"\.parquet files are not read: write its text column as JSON lines"),
        ("a.jsonl.zst", r"\.zst files are not read: unpack it into the standard input: zstd -dc .*a\.jsonl\.zst"),
        ("a.tar.gz", r"\.tar files are not read: unpack it first"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_cure(tmp_path, name, message):
    for existing in ("a.parquet", "a.jsonl.zst", "a.tar.gz"):
        (tmp_path / existing).touch()
    with pytest.raises(ValueError, match=message):
        open_sources([str(tmp_path / name)])


def test_a_file_named_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"--input names .*a\.jsonl 2 times: name each file once"):
        open_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])
