"""Compressed streams, recognized by their first bytes: gzip and Zstandard."""

import gzip
import io
import zlib
from types import ModuleType

from megatron_chatflow.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PIECE = 1 << 14
_ZSTD_PIECE = 1 << 9
"""Bytes that are decompressed at once: 512 can be 16 MB, as 4 bytes can be a block of 128 kB."""
_ZSTD_HEADER_BYTES = 18
_ZSTD_WINDOW_LOG = 27
"""The library's limit, and that of the `zstd` command."""

MAGIC_BYTES = 4
"""How many of the first bytes are read to recognize the format."""


class WindowTooLarge(Exception):
    """A Zstandard frame needs more memory than its readers give by default."""


DAMAGED = (OSError, EOFError, zlib.error)
"""What reading a damaged stream raises."""


def unpacked(stored: io.BufferedReader, name: str) -> io.BufferedIOBase:
    """Return a reader of a stream's content, whether it is compressed or not.

    Args:
        stored: the stream, at its start; its first read gives at least `MAGIC_BYTES` if it has as
            many.
        name: of the input, for the message.

    Raises:
        DataError: it is Zstandard, and the library that reads it is missing.
    """
    magic = stored.peek(MAGIC_BYTES)
    if magic.startswith(_GZIP_MAGIC):
        return gzip.GzipFile(fileobj=stored)
    if magic.startswith(_ZSTD_MAGIC):
        return io.BufferedReader(_Zstandard(stored, import_zstandard(name)), _PIECE)
    return stored


def import_zstandard(name: str) -> ModuleType:
    """Return the library for Zstandard.

    Raises:
        DataError: it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"--input {name} is compressed with Zstandard: pip install zstandard, or unpack "
            f"it: zstd -dc ... | ... --input -"
        ) from error
    return zstandard


class _Zstandard(io.RawIOBase):
    """Decompresses frame after frame.

    The library's reader takes a file that was cut off for one that ends.
    """

    def __init__(self, stored: io.BufferedReader, library: ModuleType) -> None:
        self._stored = stored
        self._library = library
        self._decompressor = library.ZstdDecompressor()
        self._frame = None
        self._begin = b""
        self._packed = b""
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._held:
            if self._frame is not None and self._frame.eof:
                self._packed, self._frame = self._frame.unused_data + self._packed, None
            self._packed = self._packed or self._stored.read(_PIECE)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame, self._begin = self._decompressor.decompressobj(), b""
            piece, self._packed = self._packed[:_ZSTD_PIECE], self._packed[_ZSTD_PIECE:]
            self._begin += piece[: _ZSTD_HEADER_BYTES - len(self._begin)]
            try:
                self._held = memoryview(self._frame.decompress(piece))
            except self._library.ZstdError as error:
                self._check_window()
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def _check_window(self) -> None:
        try:
            window = self._library.get_frame_parameters(self._begin).window_size
        except self._library.ZstdError:
            return
        if window > 1 << _ZSTD_WINDOW_LOG:
            raise WindowTooLarge(
                f"was packed with a window of {window:,} bytes, more than the "
                f"{1 << _ZSTD_WINDOW_LOG:,} that are unpacked here: "
                "unpack it into the standard input: zstd -dc --long=31 ... | ... --input -"
            )
