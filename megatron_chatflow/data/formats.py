"""What `preprocess` reads: files, globs and standard input, gzipped or not, in chunks of whole lines."""

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

STDIN = "-"
FORMATS = ("jsonl", "text")
_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_UNREADABLE = {
    ".parquet": "write its text column as JSON lines",
    ".zst": "unpack it into the standard input: zstd -dc {} | ... --input -",
    ".xz": "unpack it into the standard input: xz -dc {} | ... --input -",
    ".bz2": "unpack it into the standard input: bzip2 -dc {} | ... --input -",
    ".zip": "unpack it into the standard input: unzip -p {} | ... --input -",
    ".tar": "unpack it first",
    ".tgz": "unpack it first",
}


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a source.

    Attributes:
        first_line: number of the first line, from 1.
        data: the lines, newline characters included; only the last of a source may lack one.
        format: `jsonl` or `text`.
        position: bytes of the source read so far, as stored (compressed).
    """

    first_line: int
    data: bytes
    format: str
    position: int


class Source:
    """One file, or the standard input.

    Args:
        path: the file, or `-`.
        format: `jsonl` or `text`; None: by the name, `.txt` and `.txt.gz` are text and all else is JSON lines.

    Raises:
        ValueError: the file is missing, is a folder, or is of a kind that is not read.
    """

    def __init__(self, path: str, format: str | None = None) -> None:
        self.path = path
        self.name = "standard input" if path == STDIN else os.path.basename(path)
        self.size: int | None = None
        plain_name = self.name.lower().removesuffix(".gz")
        self.format = format or ("text" if plain_name.endswith(".txt") else "jsonl")
        self._hash = hashlib.sha256()
        self._read = 0
        if path == STDIN:
            return
        if os.path.isdir(path):
            raise ValueError(f"--input {path} is a folder: name files, or a pattern such as '{os.path.join(path, '*.jsonl')}'")
        for suffix, cure in _UNREADABLE.items():
            if plain_name.endswith(suffix):
                raise ValueError(f"--input {path}: {suffix} files are not read: {cure.format(path)}")
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise ValueError(f"--input {path} cannot be read ({error.strerror}): check the path") from error

    @property
    def stored_bytes(self) -> int:
        """Bytes read so far, as stored."""
        return self._read

    def sha256(self) -> str:
        """Returns the sha256 (hex) of the bytes read so far, as stored."""
        return self._hash.hexdigest()

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Reads the source once, in chunks of whole lines of about `size` bytes, or as long as a longer line is.

        Raises:
            ValueError: the file turns out to be damaged.
        """
        first_line = 1
        held: list[bytes] = []
        held_bytes = 0
        for block in self._blocks(max(size, len(_BOM))):
            end = block.rfind(b"\n") + 1
            if end == 0 or held_bytes + end < size:
                held.append(block)
                held_bytes += len(block)
                continue
            data = b"".join([*held, block[:end]])
            yield Chunk(first_line, data, self.format, self._read)
            first_line += data.count(b"\n")
            held, held_bytes = [block[end:]], len(block) - end
        data = b"".join(held)
        if data:
            yield Chunk(first_line, data, self.format, self._read)

    def _blocks(self, size: int) -> Iterator[bytes]:
        try:
            with open(0 if self.path == STDIN else self.path, "rb", buffering=0, closefd=self.path != STDIN) as file:
                stored = io.BufferedReader(_Tee(file, self), size)
                zipped = stored.peek(2)[:2] == _GZIP_MAGIC
                reader = gzip.GzipFile(fileobj=stored) if zipped else stored
                first = True
                while block := reader.read(size):
                    yield block.removeprefix(_BOM) if first else block
                    first = False
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{self.name} cannot be read to its end ({error}): the file is damaged or was cut off") from error


class _Tee(io.RawIOBase):
    """Passes a file's bytes on and keeps their count and hash in the source."""

    def __init__(self, file: io.RawIOBase, source: Source) -> None:
        self._file = file
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer) or 0
        self._source._read += count
        self._source._hash.update(buffer[:count])
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
        if count > 1:
            raise ValueError(f"--input names {path} {count} times: name each file once")
    return [Source(path, format) for path in paths]
