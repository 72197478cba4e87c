"""The input of `preprocess`: files, patterns and standard input, in chunks of complete records.

Files may be compressed.
"""

import glob
import hashlib
import io
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

from megatron_chatflow.data.preprocess import decompress, json_array, parquet
from megatron_chatflow.errors import DataError
from megatron_chatflow.utils.user_files import check_line

STDIN = "-"
MAX_DOCUMENT_BYTES = 1 << 28
"""Bytes of a record, decompressed, unless another limit is given."""
FORMATS = ("jsonl", "text", "parquet")
_BUFFER = 1 << 16
_MOST_BLANK = 1 << 20
"""White space before which a JSON array may begin."""
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
    """Complete records of a source: lines, or rows of a table.

    Attributes:
        first: number of the first record, from 1.
        next: number of the first one of the next chunk.
        data: lines, newline characters included (only the last of a source may lack one); or rows
            as `parquet` encodes them. Nothing of a record that is longer than the limit: it is a
            separate chunk.
        format: one of `FORMATS`.
        position: bytes of the source read so far, as stored (compressed).
        checksum: of all that was read of the source, this chunk included.
        too_long: what is wrong with such a record; else empty.
    """

    first: int
    next: int
    data: bytes | bytearray
    format: str
    position: int
    checksum: str
    too_long: str = ""


class InputSource:
    """One file or pipe, or the standard input. It is read once, from its start to its end.

    Args:
        path: the file, or `-`.
        format: one of `FORMATS`; None: by the name, `.parquet` is a table, `.txt` is text and all
            else is JSON lines.
        limit: bytes of the longest record that is read.

    Attributes:
        path, limit: as given.
        name: base name of the file; of a pipe its path.
        size: bytes as stored; None for a pipe and for the standard input.
        modified: when it was last modified, in nanoseconds; None for a pipe and for the standard
            input.
        format: one of `FORMATS`.

    Raises:
        DataError: the file is missing, is a folder, or is of a kind that is not read.
    """

    def __init__(
        self, path: str, format: str | None = None, limit: int = MAX_DOCUMENT_BYTES
    ) -> None:
        self.path = path
        self.limit = limit
        self.name = "standard input" if path == STDIN else os.path.basename(path)
        self.size: int | None = None
        self.modified: int | None = None
        name = self.name.lower()
        plain_name = next(
            (name.removesuffix(suffix) for suffix in _COMPRESSED if name.endswith(suffix)), name
        )
        self.format = format or {".txt": "text", ".parquet": "parquet"}.get(
            os.path.splitext(plain_name)[1], "jsonl"
        )
        self._too_long = f"longer than {limit:,} bytes"
        self._hash = hashlib.sha256()
        self._read = 0
        self._is_array = False
        if path == STDIN:
            if self.format == "parquet":
                raise DataError(
                    "--input - cannot be parquet, which is not read from start to end: name "
                    "the file"
                )
            return
        if os.path.isdir(path):
            raise DataError(
                f"--input {path} is a folder: name files, or a pattern such as "
                f"'{os.path.join(path, '*.jsonl')}'"
            )
        for suffix, advice in _UNREADABLE.items():
            if plain_name.endswith(suffix):
                raise DataError(
                    f"--input {path}: {suffix} files are not read: {advice.format(path)}"
                )
        try:
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    status = os.fstat(file.fileno())
        except OSError as error:
            raise DataError(
                f"--input {path} cannot be read ({error.strerror}): check the path"
            ) from error
        if not stat.S_ISREG(
            status.st_mode
        ):  # opened once, when it is read: who writes into a pipe sees it close
            if not (stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode)):
                raise DataError(f"--input {path} is neither a file nor a pipe: name one of these")
            if not os.access(path, os.R_OK):
                raise DataError(
                    f"--input {path} cannot be read (Permission denied): check its mode"
                )
            if self.format == "parquet":
                raise DataError(
                    f"--input {path} is a pipe and cannot be parquet, which is not read "
                    f"from start to end: name the file"
                )
            self.name = path
            return
        self.size, self.modified = status.st_size, status.st_mtime_ns
        if self.format == "parquet":
            parquet.check(path)
        elif name.endswith(".zst"):
            decompress.import_zstandard(path)

    @property
    def record(self) -> str:
        """What a record is called in a message: `line`, `row`, or `record` (of an array)."""
        return "row" if self.format == "parquet" else "record" if self._is_array else "line"

    @property
    def stored_bytes(self) -> int:
        """Bytes read so far, as stored."""
        return self._read

    def sha256(self) -> str:
        """Return the sha256 (hex) of the bytes read so far, as stored."""
        return self._hash.hexdigest()

    def chunks(self, size: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        """Read the source once, in chunks of complete records of about `size` bytes.

        A longer record makes a longer chunk. For a record longer than the limit, the chunk comes
        before it is read any further.

        Args:
            size: bytes of a chunk, decompressed.
            columns: of a table, those that are needed; None for all.

        Raises:
            DataError: the file turns out to be damaged, or to lack a column.
        """
        return self._rows(size, columns) if self.format == "parquet" else self._lines(size)

    def _rows(self, size: int, columns: Sequence[str] | None) -> Iterator[Chunk]:
        with open(self.path, "rb", buffering=0) as file:
            while block := file.read(size):
                self._count(block)
        first = 1
        for rows, data, done in parquet.batches(self.path, size, columns, self.limit):
            yield Chunk(
                first,
                first + rows,
                data or b"",
                self.format,
                int(done * self._read),
                self.sha256(),
                self._too_long if data is None else "",
            )
            first += rows

    def _lines(self, size: int) -> Iterator[Chunk]:
        number = 1
        checksum = 0
        held = bytearray()  # complete lines, and the first part of the next one
        complete = 0
        dropping = False  # up to the end of a line

        def chunks(data: bytearray, too_long: bool = False) -> Iterator[Chunk]:
            nonlocal number, checksum
            for part, long in [(data, True)] if too_long else self._parts(data):
                checksum = zlib.crc32(part, checksum)
                following = number + (1 if long else part.count(b"\n") + (not part.endswith(b"\n")))
                yield Chunk(
                    number,
                    following,
                    b"" if long else part,
                    self.format,
                    self._read,
                    f"{checksum:08x}",
                    self._too_long if long else "",
                )
                number = following

        for block in self._line_blocks(max(size, len(_BOM))):
            if block is None:  # an element of an array
                if held:
                    yield from chunks(held)
                    held, complete = bytearray(), 0
                yield from chunks(bytearray(), too_long=True)
                continue
            if dropping:
                end = block.find(b"\n") + 1 or len(block)
                dropping = block[end - 1] != 0x0A
                checksum = zlib.crc32(memoryview(block)[:end], checksum)
                block = block[end:]
            held += block
            end = block.rfind(b"\n") + 1
            if end:
                complete = len(held) - len(block) + end
            dropping = dropping or len(held) - complete > self.limit
            if complete and (complete >= size or dropping):
                following = held[complete:]
                del held[complete:]
                yield from chunks(held)
                held, complete = following, 0
            if dropping and held:
                yield from chunks(held, too_long=True)
                held = bytearray()
        if held:
            yield from chunks(held)

    def _parts(self, data: bytearray) -> Iterator[tuple[bytearray, bool]]:
        """Split lines at those longer than the limit; yield each part and whether it is one."""
        begin = at = 0
        while len(data) - at > self.limit:
            end = data.find(b"\n", at)
            end = len(data) if end < 0 else end
            if end - at > self.limit:
                if begin < at:
                    yield data[begin:at], False
                yield data[at : end + 1], True
                begin = end + 1
            at = end + 1
        if begin < len(data):
            yield (data[begin:] if begin else data), False

    def _line_blocks(self, size: int) -> Iterator[bytes | None]:
        """Yield blocks of lines.

        Those of a JSON array are its elements; None is one that is longer than the limit.
        """
        blocks = self._blocks(size)
        begin = b""
        for block in blocks:
            begin += block
            if begin.strip() or len(begin) > _MOST_BLANK:
                break
        blocks = chain([begin] if begin else [], blocks)
        self._is_array = self.format == "jsonl" and json_array.is_array(begin)
        if not self._is_array:
            yield from blocks
            return
        try:
            yield from json_array.lines(blocks, self.limit)
        except json_array.BrokenArray as error:
            raise DataError(f"--input {self.path}: {error}") from None

    def _blocks(self, size: int) -> Iterator[bytes]:
        try:
            with open(
                0 if self.path == STDIN else self.path,
                "rb",
                buffering=0,
                closefd=self.path != STDIN,
            ) as file:
                reader = decompress.unpacked(
                    io.BufferedReader(_Tee(file, self), max(size, _BUFFER)), self.name
                )
                first = True
                while block := reader.read(size):
                    yield block.removeprefix(_BOM) if first else block
                    first = False
        except decompress.WindowTooLarge as error:
            raise DataError(f"--input {self.path} {error}") from None
        except decompress.DAMAGED as error:
            raise DataError(
                f"{self.name} cannot be read to its end ({error}): the file is damaged or "
                f"was cut off"
            ) from error

    def _count(self, data: bytes | memoryview) -> None:
        self._read += len(data)
        self._hash.update(data)


class _Tee(io.RawIOBase):
    """Passes on a file's bytes, and keeps their count and hash in the source.

    The first few bytes are passed on together.
    """

    def __init__(self, file: BinaryIO, source: InputSource) -> None:
        self._file = file
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = 0
        file: Any = self._file  # `BinaryIO` lacks readinto
        while more := file.readinto(buffer[count:]):
            count += more
            if self._source.stored_bytes + count >= decompress.MAGIC_BYTES:
                break
        self._source._count(buffer[:count])
        return count


def open_sources(
    inputs: Sequence[str], format: str | None = None, limit: int = MAX_DOCUMENT_BYTES
) -> list[InputSource]:
    """Return the sources that paths, glob patterns and `-` name, in the order given.

    A pattern's matches are sorted by name.

    Raises:
        DataError: a file is missing or not readable here, a pattern matches nothing, or a file is
            named twice.
    """
    paths: list[str] = []
    for item in inputs:
        if item == STDIN or os.path.exists(item) or not glob.has_magic(item):
            paths.append(item)
            continue
        matches = sorted(path for path in glob.glob(item, recursive=True) if os.path.isfile(path))
        if not matches:
            raise DataError(f"--input {item} matches no file: check the pattern")
        paths.extend(matches)
    for path, count in Counter(paths).items():
        check_line("--input", path)
        if count > 1:
            raise DataError(f"--input names {path} {count} times: name each file once")
    sources = [InputSource(path, format, limit) for path in paths]
    pipes: dict[tuple[int, int], str] = {}
    for path in (source.path for source in sources if source.size is None):
        status = os.fstat(0) if path == STDIN else os.stat(path)
        other = pipes.setdefault((status.st_dev, status.st_ino), path)
        if other != path:
            raise DataError(f"--input names one pipe twice, as {other} and {path}: name it once")
    return sources
