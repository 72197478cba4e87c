"""A JSON array as JSON lines: each element on one line, whatever its white space."""

import re
from collections.abc import Iterator

from megatron_chatflow.errors import DataError

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TOKEN = re.compile(_STRING + rb'|["{}\[\],]', re.DOTALL)
_BREAK = re.compile(_STRING + rb"|[\r\n]+", re.DOTALL)
_STRING_END = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_LONG = 1 << 20
_UNMATCHED = (
    "brackets do not match in record {} of its array, so the records after it cannot be separated: "
    "correct the file"
)
_CUT_OFF = "its array does not end, and record {} is the last: the file was cut off"
_DEEPEST = 1 << 20
_CLOSES = {ord("{"): ord("}"), ord("["): ord("]")}


class BrokenArray(DataError):
    """The elements of an array cannot be separated."""


def is_array(block: bytes) -> bool:
    """Return whether text that begins like this is a JSON array."""
    return block.lstrip()[:1] == b"["


def lines(blocks: Iterator[bytes], limit: int) -> Iterator[bytes | None]:
    """Yield the elements of an array, one per line; memory is bounded by the limit.

    Args:
        blocks: the text of the array, cut anywhere.
        limit: bytes of the longest element that is wanted.

    Yields:
        Some lines, newline characters included, or None for an element that is longer than the
        limit, before it is read to its end. Errors within an element are left to its reader.

    Raises:
        BrokenArray: the brackets do not match, the array does not end, or something follows it.
    """
    held = next(blocks)
    begin = at = held.index(b"[") + 1
    number = 1
    brackets = bytearray()
    dropping = False
    while True:
        found, ended = [], False
        for token in _TOKEN.finditer(held, at):
            kind = held[token.start()]
            if kind == 0x22 and token.end() - token.start() == 1:  # continues in the next block
                at = token.start()
                break
            at = token.end()
            if kind in _CLOSES:
                brackets.append(_CLOSES[kind])
            elif brackets and kind in b"]}":
                if brackets.pop() != kind:
                    raise BrokenArray(_UNMATCHED.format(number))
            elif kind == 0x7D:
                raise BrokenArray(_UNMATCHED.format(number))
            elif not brackets and kind in b",]":
                ended = kind == 0x5D
                if dropping:
                    dropping = False
                    number += 1
                elif token.start() - begin > limit:
                    yield from _joined(found)
                    yield None
                    found = []
                    number += 1
                else:
                    element = held[begin : token.start()]
                    if element.strip() or not ended:
                        found.append(_on_one_line(element))
                        number += 1
                begin = at
                if ended:
                    break
        else:
            at = len(held)
        yield from _joined(found)
        if ended:
            _check_end(held[begin:], blocks)
            return
        held, at = held[begin:], at - begin
        begin = 0
        if not dropping and len(held) > limit:
            yield None
            dropping = True
        if len(brackets) > _DEEPEST:
            raise BrokenArray(f"record {number} is nested too deeply to be read: take it out")
        if dropping:  # only the brackets matter up to its end
            if at < len(held):
                held, at = _after_string(held[at:], blocks, number), 0
                continue
            held, at = b"", 0
        # a long string is scanned again only when it has doubled
        wanted = min(2 * len(held), limit + 1) if at < len(held) else 0
        more, size = [], len(held)
        for block in blocks:
            more.append(block)
            size += len(block)
            if size >= wanted:
                break
        if not more:
            raise BrokenArray(_CUT_OFF.format(number))
        held = b"".join([held, *more])


def _joined(found: list[bytes]) -> Iterator[bytes]:
    """Yield lines as one block, but those of long elements without another copy."""
    if sum(map(len, found)) > _LONG:
        for element in found:
            yield element
            yield b"\n"
    elif found:
        yield b"\n".join([*found, b""])


def _after_string(begin: bytes, blocks: Iterator[bytes], number: int) -> bytes:
    """Return what follows a string of which only the end matters."""
    piece = begin[1:]
    while not (end := _STRING_END.match(piece)):
        escaping = (len(piece) - len(piece.rstrip(b"\\"))) % 2
        following = next(blocks, None)
        if following is None:
            raise BrokenArray(_CUT_OFF.format(number))
        piece = b"\\" * escaping + following
    return piece[end.end() :]


def _on_one_line(element: bytes) -> bytes:
    """Return an element without line breaks; one within a string remains an error, as in JSON."""
    element = element.strip()
    if b"\n" in element or b"\r" in element:
        element = _BREAK.sub(
            lambda m: re.sub(rb"[\r\n]", b"\x01", m[0]) if m[0][:1] == b'"' else b" ", element
        )
    return element or b","


def _check_end(rest: bytes, blocks: Iterator[bytes]) -> None:
    while not rest.strip():
        more = next(blocks, None)
        if more is None:
            return
        rest = more
    raise BrokenArray(
        "something follows the array that it begins with: write one array, "
        "or one JSON object on each line"
    )
