"""Unpickle plain data from a file that may have been written by an attacker.

Python's own unpickler looks names up in modules, calls what it finds, and allocates what the file
announces. This one knows the instructions that pickled data needs and a table of names; everything
else is refused. Nothing is imported or called but what is in the table, and memory grows with
the bytes that were read, not with what they announce.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

PROTOCOL = 5
"""The highest protocol that is read; those below 2 are text, which nothing here writes."""
_BYTES_PER_OBJECT = 4
"""A pickle of a checkpoint has 12 bytes or more for each container, string and object."""
_DEEPEST = 100
_LARGEST_KEY = 1 << 60
_DAMAGE = (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error)


@dataclass(frozen=True, slots=True)
class Maker:
    """What a name means that a pickle calls. The functions check what the file gives them."""

    new: Callable[..., Any]
    allocate: Callable[..., Any] | None = None
    """In place of `new` where a pickle makes an object without its `__init__`."""


Known = Mapping[tuple[str, str], Any]
"""{(module, name): a `Maker`, or the value that the name means}."""


class StrictUnpickler:
    """Reads one pickle after the other from `data`.

    Args:
        data: the content of a file; it is not changed.
        known: the names that may occur.
        builders: {type: (object, state) -> None} of the objects that may be filled; it checks the
            state.
        persistent: resolves persistent ids; None refuses them.
        keys: types of dictionary keys that are allowed besides strings, small integers and None.
    """

    def __init__(
        self,
        data: bytes,
        known: Known,
        builders: Mapping[type, Callable[[Any, Any], None]] = MappingProxyType({}),
        persistent: Callable[[Any], Any] | None = None,
        keys: tuple[type, ...] = (),
    ) -> None:
        """Begin at the first pickle of `data`."""
        self._data, self._known, self._builders = data, known, builders
        self._persistent, self._keys = persistent, keys
        self.position = 0
        """Where the next pickle begins."""
        self._room = len(data) // _BYTES_PER_OBJECT + 1000

    def load(self) -> Any:
        """The next object. Raises pickle.UnpicklingError where anything is out of the ordinary."""
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        data, handlers = self._data, _HANDLERS
        try:
            while (code := data[self.position]) != _STOP:
                self.position += 1
                handlers[code](self)
            self.position += 1
            (result,) = self._stack
        except _DAMAGE as error:
            place = f"at byte {self.position}"
            raise UnpicklingError(f"it is no intact pickle {place} ({_reason(error)})") from None
        if self._marked:
            raise UnpicklingError("it is no intact pickle (it ends inside of a container)")
        return result

    # Bytes of the file.

    def _take(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if end > len(self._data):
            raise UnpicklingError(f"it ends at byte {len(self._data)}, before {count} bytes more")
        self.position = end
        return self._data[start:end]

    def _line(self) -> str:
        end = self._data.index(b"\n", self.position, self.position + 500)
        line = self._data[self.position : end]
        self.position = end + 1
        return line.decode()

    def _count(self) -> None:
        self._room -= 1
        if self._room < 0:
            raise UnpicklingError("it holds more objects than its bytes should")

    # Instructions. Each pops its operands from the stack and pushes its result.

    def _protocol(self) -> None:
        if (protocol := self._take(1)[0]) > PROTOCOL:
            raise UnpicklingError(f"its protocol is {protocol}; {PROTOCOL} is the highest known")

    def _integer(self, layout: struct.Struct) -> None:
        self._stack.extend(layout.unpack(self._take(layout.size)))

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def _text(self, size: struct.Struct) -> None:
        self._count()
        (length,) = size.unpack(self._take(size.size))
        self._stack.append(str(self._take(length), "utf-8", "surrogatepass"))

    def _bytes(self, size: struct.Struct) -> None:
        self._count()
        (length,) = size.unpack(self._take(size.size))
        self._stack.append(self._take(length))

    def _bytearray(self) -> None:
        self._bytes(_U64)
        self._stack[-1] = bytearray(self._stack[-1])

    def _put(self, layout: struct.Struct) -> None:
        (index,) = layout.unpack(self._take(layout.size))
        self._memo[index] = self._stack[-1]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, layout: struct.Struct) -> None:
        self._stack.append(self._memo[layout.unpack(self._take(layout.size))[0]])

    def _mark(self) -> None:
        if len(self._marked) == _DEEPEST:
            raise UnpicklingError(f"it is nested more than {_DEEPEST} levels deep")
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _push_new(self, make: Callable[[], Any]) -> None:
        self._count()
        self._stack.append(make())

    def _tuple(self) -> None:
        items = self._since_mark()
        self._count()
        self._stack.append(tuple(items))

    def _short_tuple(self, length: int) -> None:
        self._count()
        items = tuple(self._stack[-length:])
        if len(items) < length:
            raise UnpicklingError("a tuple lacks its items")
        self._stack[-length:] = [items]

    def _append(self) -> None:
        item = self._stack.pop()
        self._list().append(item)

    def _appends(self) -> None:
        items = self._since_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        target = self._stack[-1]
        if type(target) is not list:
            raise UnpicklingError(f"it appends to a {type(target).__name__}")
        return target

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        items = self._since_mark()
        if len(items) % 2:
            raise UnpicklingError("a key has no value")
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict and type(target) is not OrderedDict:
            raise UnpicklingError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            kind = type(key)
            # Tuples may be nested so deeply that hashing them ends the process, and large integers
            # can be chosen to have one hash.
            is_small = kind in (int, bool) and abs(key) < _LARGEST_KEY
            if not (kind is str or key is None or is_small or kind in self._keys):
                raise UnpicklingError(f"a {kind.__name__} is a key")
            target[key] = value

    def _global(self) -> None:
        module = self._line()
        self._name(module, self._line())

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or (module, name) not in self._known:
            raise UnpicklingError(f"it refers to {module!s:.100}.{name!s:.100}")
        self._stack.append(self._known[module, name])

    def _call(self, allocate: bool = False) -> None:
        arguments, maker = self._stack.pop(), self._stack.pop()
        if not isinstance(maker, Maker) or type(arguments) is not tuple:
            raise UnpicklingError(f"it calls a {type(maker).__name__}")
        self._count()
        make = maker.allocate if allocate and maker.allocate else maker.new
        self._stack.append(make(*arguments))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) not in self._builders:
            raise UnpicklingError(f"it fills a {type(target).__name__}")
        self._builders[type(target)](target, state)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise UnpicklingError("it refers to data outside of it")
        self._stack.append(self._persistent(self._stack.pop()))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


_U8, _U16, _U32, _U64 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q"))
_STOP = pickle.STOP[0]
_CODES: dict[bytes, Callable[[StrictUnpickler], object]] = {
    pickle.PROTO: StrictUnpickler._protocol,
    pickle.FRAME: lambda self: self._take(8),
    pickle.NONE: lambda self: self._stack.append(None),
    pickle.NEWTRUE: lambda self: self._stack.append(True),
    pickle.NEWFALSE: lambda self: self._stack.append(False),
    pickle.BININT: lambda self: self._integer(struct.Struct("<i")),
    pickle.BININT1: lambda self: self._integer(_U8),
    pickle.BININT2: lambda self: self._integer(_U16),
    pickle.LONG1: StrictUnpickler._long,
    pickle.BINFLOAT: lambda self: self._integer(struct.Struct(">d")),
    pickle.BINUNICODE: lambda self: self._text(_U32),
    pickle.SHORT_BINUNICODE: lambda self: self._text(_U8),
    pickle.BINUNICODE8: lambda self: self._text(_U64),
    pickle.BINBYTES: lambda self: self._bytes(_U32),
    pickle.SHORT_BINBYTES: lambda self: self._bytes(_U8),
    pickle.BINBYTES8: lambda self: self._bytes(_U64),
    pickle.BYTEARRAY8: StrictUnpickler._bytearray,
    pickle.EMPTY_LIST: lambda self: self._push_new(list),
    pickle.EMPTY_DICT: lambda self: self._push_new(dict),
    pickle.EMPTY_TUPLE: lambda self: self._stack.append(()),
    pickle.MARK: StrictUnpickler._mark,
    pickle.TUPLE: StrictUnpickler._tuple,
    pickle.TUPLE1: lambda self: self._short_tuple(1),
    pickle.TUPLE2: lambda self: self._short_tuple(2),
    pickle.TUPLE3: lambda self: self._short_tuple(3),
    pickle.APPEND: StrictUnpickler._append,
    pickle.APPENDS: StrictUnpickler._appends,
    pickle.SETITEM: StrictUnpickler._set_item,
    pickle.SETITEMS: StrictUnpickler._set_items,
    pickle.BINPUT: lambda self: self._put(_U8),
    pickle.LONG_BINPUT: lambda self: self._put(_U32),
    pickle.MEMOIZE: StrictUnpickler._memoize,
    pickle.BINGET: lambda self: self._get(_U8),
    pickle.LONG_BINGET: lambda self: self._get(_U32),
    pickle.GLOBAL: StrictUnpickler._global,
    pickle.STACK_GLOBAL: StrictUnpickler._stack_global,
    pickle.REDUCE: StrictUnpickler._call,
    pickle.NEWOBJ: lambda self: self._call(allocate=True),
    pickle.BUILD: StrictUnpickler._build,
    pickle.BINPERSID: StrictUnpickler._persistent_id,
}


def _refuse(self: StrictUnpickler) -> None:
    raise UnpicklingError(f"it has an instruction of no checkpoint at byte {self.position - 1}")


_HANDLERS = [_CODES.get(bytes([code]), _refuse) for code in range(256)]
