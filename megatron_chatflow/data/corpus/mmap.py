"""Read-only memory maps that hold no file descriptor.

Python's `mmap` keeps a duplicate of the descriptor for the life of the map (an option only since
3.13), so a blend of a thousand corpora would hold two thousand of them, more than the usual `ulimit
-n` of 1,024. The system call needs the descriptor only while it maps; so it is called directly here
and the file is closed again.
"""

import ctypes
import mmap
import os
import weakref

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str) -> np.ndarray:
    """Map a complete file.

    Args:
        path: the file.

    Returns:
        uint8 [bytes in the file], read only; the map is undone when neither this array nor a view
        of it is left.

    Raises:
        OSError: the file cannot be opened or mapped.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            return np.empty(0, np.uint8)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _MAP_FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
    finally:
        os.close(descriptor)
    buffer = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(buffer, _libc.munmap, address, size).atexit = False
    # numpy's annotation leaves ctypes arrays out.
    array = np.frombuffer(buffer, np.uint8)  # pyright: ignore[reportCallIssue, reportArgumentType]
    array.flags.writeable = False
    return array
