"""Connections with other programs, every one of them with an end, and lines of JSON over them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

_MARK = "chatflow: "
"""What a line of ours begins with; other programs may hold the port."""


def resolve(address: str, port: int, end: float) -> list[Any]:
    """`getaddrinfo`, with an end: a name server may not answer for longer than that."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.append(error)

    thread = threading.Thread(target=ask, name="resolve", daemon=True)
    thread.start()
    thread.join(max(0.0, end - time.monotonic()))
    found = answers[0] if answers else socket.gaierror(0, "no answer from the name server")
    if isinstance(found, list):
        return found
    raise found if isinstance(found, OSError) else socket.gaierror(0, str(found))


def connect(found: list[Any], seconds: float) -> socket.socket:
    """Connect to the first address of `resolve` that answers, each within `seconds`."""
    failed: OSError = OSError(0, "no address")
    for family, kind, protocol, _, where in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(seconds)
            connection.connect(where)
            if connection.getsockname() != connection.getpeername():
                return connection
            failed = OSError(0, "connected to itself")  # TCP does that when nobody listens
        except OSError as error:
            failed = error
        connection.close()
    raise failed


def line(what: Mapping[str, Any]) -> bytes:
    """Return a line that `parse` reads."""
    return (_MARK + json.dumps(what) + "\n").encode()


def parse(text: bytes) -> dict[str, Any]:
    """What a line of ours holds; nothing for any other text."""
    try:
        decoded = text.split(b"\n")[0].decode()
        found = json.loads(decoded.removeprefix(_MARK))
    except ValueError:
        return {}
    return found if decoded.startswith(_MARK) and isinstance(found, dict) else {}


class Lines:
    """The lines that another process sends."""

    def __init__(self, connection: socket.socket) -> None:
        """Read from this connection."""
        self._connection, self._text = connection, bytearray()

    def read(self, end: float, limit: int) -> bytes:
        """Return the next line.

        Raises TimeoutError at `end`, OSError where the other side is gone; other programs may give
        less than a line, or more than `limit`.
        """
        while b"\n" not in self._text and len(self._text) < limit:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._connection.settimeout(left)
            data = self._connection.recv(65536)
            if not data:
                break
            self._text += data
        line, _, rest = self._text.partition(b"\n")
        self._text = rest
        return bytes(line)


def reason_of(error: OSError) -> str:
    """Return why a connection failed, in words."""
    return error.strerror or str(error) or type(error).__name__
