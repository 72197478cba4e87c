"""Packings kept beside the corpus, so that processes of a node share one in memory and a start does not pack again.

    <prefix>.packing-<fingerprint>-<seq_length>

The fingerprint is a hash of the lengths of all conversations that were packed (those of one part of the split). They and the sequence
length are all that a packing depends on, so a file with that name can be damaged, but never stale. It begins with a checksum of the rest,
which is compared at each opening; a file that fails is written anew. Files appear under their names at once and whole, so any number
of processes, on any number of machines, may open and write the same one at the same time: what they write is the same.
"""

import contextlib
import glob
import hashlib
import os
import struct
import uuid
import warnings

import numpy as np

from megatron_chatflow.data.mapping import map_file
from megatron_chatflow.data.packing import Packing, pack

VERSION = 1
"""Raised when `pack` packs otherwise, or the layout of the file changes."""
_HEADER = struct.Struct("<32s4q")


def cache_path(prefix: str, lengths: np.ndarray, seq_length: int) -> str:
    """Returns where the packing of conversations of these lengths is kept."""
    digest = hashlib.sha256(struct.pack("<q", VERSION))
    digest.update(np.ascontiguousarray(lengths, "<i8").data)
    return f"{prefix}.packing-{digest.hexdigest()[:32]}-{seq_length}"


def cache_pattern(prefix: str) -> str:
    """Returns a pattern for `glob` that finds every packing of a corpus, and what a killed process left of one."""
    return glob.escape(prefix) + ".packing-*"


def cached_pack(prefix: str, lengths: np.ndarray, seq_length: int) -> Packing:
    """Returns `pack(lengths, seq_length)`, from the file beside the corpus where there is a sound one, which else is written.

    Where it cannot be written, one warning says so and the packing is held in memory.

    Args:
        prefix: the corpus.
        lengths: tokens of each conversation, integers [n].
        seq_length: positions in a window.
    """
    path = cache_path(prefix, lengths, seq_length)
    with contextlib.suppress(OSError):
        packing = _load(path)
        if packing is not None:
            return packing
    packing = pack(lengths, seq_length)
    try:
        _save(path, packing)
    except OSError as error:
        warnings.warn(
            f"corpus {prefix}: the packing of its conversations cannot be kept beside it ({error.strerror}), so it is made at every start",
            stacklevel=2,
        )
    return packing


def _checksum(path: str, *content: bytes | memoryview) -> bytes:
    """A hash of the file's own name and what the file holds, 32 bytes."""
    digest = hashlib.sha256(os.path.basename(path).rpartition(".packing-")[2].encode())
    for part in content:
        digest.update(part)
    return digest.digest()


def _save(path: str, packing: Packing) -> None:
    starts, order = packing.starts.astype("<i8", copy=False), packing.order.astype(packing.order.dtype.newbyteorder("<"), copy=False)
    sizes = struct.pack("<4q", len(starts), order.itemsize, packing.num_cut, packing.num_skipped)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            for part in (_checksum(path, sizes, starts.data, order.data), sizes, starts.data, order.data):
                file.write(part)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _load(path: str) -> Packing | None:
    """Returns the packing in a file as a view of it, or None when it is damaged."""
    content = map_file(path)
    if len(content) < _HEADER.size:
        return None
    checksum, num_starts, itemsize, num_cut, num_skipped = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if checksum != _checksum(path, content[32:].data):
        return None
    order = _HEADER.size + 8 * num_starts
    return Packing(content[order:].view(f"<i{itemsize}"), content[_HEADER.size : order].view("<i8"), num_cut, num_skipped)
