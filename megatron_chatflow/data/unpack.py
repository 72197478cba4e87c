"""Compressed streams, told by their first bytes: gzip and Zstandard."""

import gzip
import io
import zlib
from types import ModuleType

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PIECE = 1 << 14

MAGIC_BYTES = 4
"""How many of the first bytes are looked at."""

DAMAGED = (OSError, EOFError, zlib.error)
"""What reading a damaged stream raises."""


def unpacked(stored: io.BufferedReader, name: str) -> io.BufferedIOBase:
    """Returns what reads a stream's content, whether it is compressed or not.

    Args:
        stored: the stream, at its start; its first read gives at least `MAGIC_BYTES` if there are so many.
        name: of the input, for the sentence.

    Raises:
        ValueError: it is Zstandard, and the library that reads it is missing.
    """
    magic = stored.peek(MAGIC_BYTES)
    if magic.startswith(_GZIP_MAGIC):
        return gzip.GzipFile(fileobj=stored)
    if magic.startswith(_ZSTD_MAGIC):
        return io.BufferedReader(_Zstandard(stored, import_zstandard(name)), _PIECE)
    return stored


def import_zstandard(name: str) -> ModuleType:
    """Returns the library for Zstandard.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"--input {name} is compressed with Zstandard: pip install zstandard, or unpack it: zstd -dc ... | ... --input -") from error
    return zstandard


class _Zstandard(io.RawIOBase):
    """Unpacks frame after frame. The library's own reader takes a file that was cut off for one that ends."""

    def __init__(self, stored: io.BufferedReader, library: ModuleType) -> None:
        self._stored = stored
        self._library = library
        self._decompressor = library.ZstdDecompressor()
        self._frame = None
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._held:
            left = b""
            if self._frame is not None and self._frame.eof:
                left, self._frame = self._frame.unused_data, None
            piece = left or self._stored.read(_PIECE)
            if not piece:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._held = memoryview(self._frame.decompress(piece))
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count
