"""What `preprocess` reads: files, patterns and standard input, compressed or not, in chunks of whole records."""

import glob
import hashlib
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

from megatron_chatflow.data import json_array, parquet, unpack
from megatron_chatflow.utils.user_files import check_line

STDIN = "-"
FORMATS = ("jsonl", "text", "parquet")
_BUFFER = 1 << 16
_BOM = b"\xef\xbb\xbf"
_COMPRESSED = (".gz", ".zst")
_UNREADABLE = {
    ".xz": "unpack it into the standard input: xz -dc {} | ... --input -",
    ".bz2": "unpack it into the standard input: bzip2 -dc {} | ... --input -",
    ".zip": "unpack it into the standard input: unzip -p {} | ... --input -",
    ".tar": "unpack it first",
    ".tgz": "unpack it first",
}


@dataclass(frozen=True)
class Chunk:
    """Whole records of a source: lines, or rows of a table.

    Attributes:
        first: number of the first record, from 1.
        next: number of the first one of the next chunk.
        data: lines, newline characters included (only the last of a source may lack one); or rows as `parquet` packs them.
        format: one of `FORMATS`.
        position: bytes of the source read so far, as stored (compressed).
        checksum: of all that was read of the source, this chunk included.
    """

    first: int
    next: int
    data: bytes
    format: str
    position: int
    checksum: str


class Source:
    """One file, or the standard input.

    Attributes:
        path: as given.
        name: base name of the file.
        size: bytes as stored; None of the standard input.
        modified: when it was last modified, in nanoseconds; None of the standard input.
        format: one of `FORMATS`.

    Args:
        path: the file, or `-`.
        format: one of `FORMATS`; None: by the name, `.parquet` is a table, `.txt` is text and all else is JSON lines.

    Raises:
        ValueError: the file is missing, is a folder, or is of a kind that is not read.
    """

    def __init__(self, path: str, format: str | None = None) -> None:
        self.path = path
        self.name = "standard input" if path == STDIN else os.path.basename(path)
        self.size: int | None = None
        self.modified: int | None = None
        name = self.name.lower()
        plain_name = next((name.removesuffix(suffix) for suffix in _COMPRESSED if name.endswith(suffix)), name)
        self.format = format or {".txt": "text", ".parquet": "parquet"}.get(os.path.splitext(plain_name)[1], "jsonl")
        self._hash = hashlib.sha256()
        self._read = 0
        self._is_array = False
        if path == STDIN:
            if self.format == "parquet":
                raise ValueError("--input - cannot be parquet, which is not read from start to end: name the file")
            return
        if os.path.isdir(path):
            raise ValueError(f"--input {path} is a folder: name files, or a pattern such as '{os.path.join(path, '*.jsonl')}'")
        for suffix, cure in _UNREADABLE.items():
            if plain_name.endswith(suffix):
                raise ValueError(f"--input {path}: {suffix} files are not read: {cure.format(path)}")
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
        except OSError as error:
            raise ValueError(f"--input {path} cannot be read ({error.strerror}): check the path") from error
        self.size, self.modified = status.st_size, status.st_mtime_ns
        if self.format == "parquet":
            parquet.check(path)
        elif name.endswith(".zst"):
            unpack.import_zstandard(path)

    @property
    def record(self) -> str:
        """What a record is called in a message: `line`, `row`, or `record` (of an array)."""
        return "row" if self.format == "parquet" else "record" if self._is_array else "line"

    @property
    def stored_bytes(self) -> int:
        """Bytes read so far, as stored."""
        return self._read

    def sha256(self) -> str:
        """Returns the sha256 (hex) of the bytes read so far, as stored."""
        return self._hash.hexdigest()

    def chunks(self, size: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        """Reads the source once, in chunks of whole records of about `size` bytes, or as long as a longer record is.

        Args:
            size: bytes of a chunk, unpacked.
            columns: of a table, those that are needed; None for all.

        Raises:
            ValueError: the file turns out to be damaged, or to lack a column.
        """
        return self._rows(size, columns) if self.format == "parquet" else self._lines(size)

    def _rows(self, size: int, columns: Sequence[str] | None) -> Iterator[Chunk]:
        with open(self.path, "rb", buffering=0) as file:
            while block := file.read(size):
                self._count(block)
        first = 1
        for rows, data, done in parquet.batches(self.path, size, columns):
            yield Chunk(first, first + rows, data, self.format, int(done * self._read), self.sha256())
            first += rows

    def _lines(self, size: int) -> Iterator[Chunk]:
        first = 1
        checksum = 0
        held: list[bytes] = []
        held_bytes = 0
        for block in self._line_blocks(max(size, len(_BOM))):
            end = block.rfind(b"\n") + 1
            if end == 0 or held_bytes + end < size:
                held.append(block)
                held_bytes += len(block)
                continue
            data = b"".join([*held, block[:end]])
            following = first + data.count(b"\n")
            checksum = zlib.crc32(data, checksum)
            yield Chunk(first, following, data, self.format, self._read, f"{checksum:08x}")
            first = following
            held, held_bytes = [block[end:]], len(block) - end
        data = b"".join(held)
        if data:
            following = first + data.count(b"\n") + (not data.endswith(b"\n"))
            yield Chunk(first, following, data, self.format, self._read, f"{zlib.crc32(data, checksum):08x}")

    def _line_blocks(self, size: int) -> Iterator[bytes]:
        """Blocks of lines; those of a JSON array are its elements."""
        blocks = self._blocks(size)
        begin = b""
        for block in blocks:
            begin += block
            if begin.strip():
                break
        blocks = chain([begin] if begin else [], blocks)
        self._is_array = self.format == "jsonl" and json_array.is_array(begin)
        if not self._is_array:
            yield from blocks
            return
        try:
            yield from json_array.lines(blocks)
        except json_array.BrokenArray as error:
            raise ValueError(f"--input {self.path}: {error}") from None

    def _blocks(self, size: int) -> Iterator[bytes]:
        try:
            with open(0 if self.path == STDIN else self.path, "rb", buffering=0, closefd=self.path != STDIN) as file:
                reader = unpack.unpacked(io.BufferedReader(_Tee(file, self), max(size, _BUFFER)), self.name)
                first = True
                while block := reader.read(size):
                    yield block.removeprefix(_BOM) if first else block
                    first = False
        except unpack.DAMAGED as error:
            raise ValueError(f"{self.name} cannot be read to its end ({error}): the file is damaged or was cut off") from error

    def _count(self, data: bytes | memoryview) -> None:
        self._read += len(data)
        self._hash.update(data)


class _Tee(io.RawIOBase):
    """Passes a file's bytes on, the first few of them together, and keeps their count and hash in the source."""

    def __init__(self, file: BinaryIO, source: Source) -> None:
        self._file = file
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = 0
        while more := self._file.readinto(buffer[count:]):
            count += more
            if self._source.stored_bytes + count >= unpack.MAGIC_BYTES:
                break
        self._source._count(buffer[:count])
        return count


def open_sources(inputs: Sequence[str], format: str | None = None) -> list[Source]:
    """Returns the sources that paths, glob patterns and `-` name: in the order given, a pattern's matches by name.

    Raises:
        ValueError: a file is missing or not readable here, a pattern matches nothing, or a file is named twice.
    """
    paths: list[str] = []
    for item in inputs:
        if item == STDIN or os.path.exists(item) or not glob.has_magic(item):
            paths.append(item)
            continue
        matches = sorted(path for path in glob.glob(item, recursive=True) if os.path.isfile(path))
        if not matches:
            raise ValueError(f"--input {item} matches no file: check the pattern")
        paths.extend(matches)
    for path, count in Counter(paths).items():
        check_line("--input", path)
        if count > 1:
            raise ValueError(f"--input names {path} {count} times: name each file once")
    return [Source(path, format) for path in paths]
