"""Read YAML, JSON and words that users write; what is wrong with them is a ConfigError.

Files come from anywhere, so nothing here recurses with their depth, and no text may hold what would
start a new line of a log or of a script.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_chatflow.errors import ConfigError

_DEEPEST = 100
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TAGS = {f"tag:yaml.org,2002:{name}": name for name in ("str", "int", "float", "bool", "null")}
_CONTAINERS = (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_MERGE = "<<"
_MERGED = object()


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Events(_Loader):
    """libyaml's parser where PyYAML was built with it: an order of magnitude faster."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that is a number in YAML 1.2, as well as what is of another type in YAML 1.1."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789")
)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(f"^(?:{_INT.pattern})$"), list("-+0123456789")
)


def load_json(text: str | bytes) -> Any:
    """Return what JSON text holds.

    Raises:
        ConfigError: it is not JSON, not UTF-8, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError("it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def read_text(path: str | Path) -> str:
    """Return the text of a file that a user named.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8. The message is the reason alone; the caller
            adds the setting, the path, and what to do.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError("it is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from None
    except ValueError as error:  # a NUL character in the path
        raise ConfigError(str(error)) from None


def dump_yaml(content: Any) -> str:
    """Return plain values as YAML text that `load_yaml` reads back to the same values."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_yaml(text: str) -> Any:
    """Return what YAML text holds, as plain values.

    It is YAML 1.2 where YAML 1.1 surprises: `no` and `on` are text (codes of languages), `1e6` is a
    number, `010` is ten, dates are text.

    Raises:
        ConfigError: it is not YAML, a key comes twice, or it is nested more than 100 levels deep.
    """
    try:
        return _build(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {min(mark.line, text.rstrip().count(chr(10))) + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"not valid YAML{where} ({problem}); correct the file") from None


def _build(text: str) -> Any:
    """Build the values from the parser's events, with an explicit stack in place of recursion."""
    documents: list[Any] = []
    anchors: dict[str, Any] = {}
    open_nodes: list[_Node] = [_Node(documents)]
    for event in yaml.parse(text, Loader=_Events):
        anchor = getattr(event, "anchor", None)
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event, line)
        elif isinstance(event, yaml.CollectionStartEvent):
            if event.tag not in _CONTAINERS:
                raise ConfigError(f"the tag {event.tag!r} in line {line} is not known; remove it")
            if len(open_nodes) > _DEEPEST:
                raise ConfigError(
                    f"line {line} is nested more than {_DEEPEST} levels deep; write fewer levels"
                )
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            open_nodes.append(_Node({} if is_mapping else [], event.anchor))
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            value = open_nodes[-1].finished()
            anchor = open_nodes.pop().anchor
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise ConfigError(
                    f"line {line} names *{event.anchor}, which is not known; write it out"
                )
            open_nodes[-1].add(anchors[event.anchor], line, plain=False)
            continue
        elif isinstance(event, yaml.DocumentStartEvent) and documents:
            raise ConfigError(f"a second document begins in line {line}; keep one")
        else:
            continue
        if anchor is not None:
            anchors[anchor] = value
        plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
        open_nodes[-1].add(value, line, plain)
    return documents[0] if documents else None


class _Node:
    """A list or a mapping that is being filled."""

    def __init__(self, content: Any, anchor: str | None = None) -> None:
        self.content = content
        self.anchor = anchor
        self._has_key = False
        self._key: Any = None
        self._merged: list[Mapping[Any, Any]] | None = None

    def add(self, value: Any, line: int, plain: bool) -> None:
        """Add an element, a key, or the value of the key before."""
        if isinstance(self.content, list):
            self.content.append(value)
        elif not self._has_key:
            if isinstance(value, list | dict):
                raise ConfigError(f"the key in line {line} is not text; write text")
            is_merge = value == _MERGE and plain
            if value in self.content or (is_merge and self._merged is not None):
                raise ConfigError(
                    f"key {value!r} comes twice, the second time in line {line}; keep one"
                )
            self._has_key, self._key = True, _MERGED if is_merge else value
        else:
            self._has_key = False
            if self._key is _MERGED:
                self._merged = value if isinstance(value, list) else [value]
                if not all(isinstance(mapping, dict) for mapping in self._merged):
                    raise ConfigError(f"<< in line {line} does not name a mapping; name one")
            else:
                self.content[self._key] = value

    def finished(self) -> Any:
        """Return the content, with the keys of merged mappings that it does not set itself."""
        for mapping in self._merged or ():
            self.content = {**mapping, **self.content}
        return self.content


def _scalar(event: yaml.ScalarEvent, line: int) -> Any:
    value = event.value
    if event.tag in (None, "!"):
        kind = _kind(value) if event.implicit[0] else "str"
    elif event.tag in _TAGS:
        kind = _TAGS[event.tag]
    else:
        raise ConfigError(f"the tag {event.tag!r} in line {line} is not known; remove it")
    try:
        if kind == "int":
            digits = value.replace("_", "")
            return int(digits, 0 if digits[:2] in ("0x", "0o", "0b") else 10)
        if kind == "float":
            return float(re.sub(r"\.(?=[iInN])", "", value))
    except ValueError:
        short = value if len(value) <= 40 else f"{value[:40]}..."
        raise ConfigError(f"{short!r} in line {line} is not a number; correct it") from None
    return {"bool": value.lower() == "true", "null": None}.get(kind, value)


def _kind(text: str) -> str:
    """Return the type of a plain scalar."""
    if _NULL.fullmatch(text):
        return "null"
    if _BOOL.fullmatch(text):
        return "bool"
    if text[0] not in "+-.0123456789":
        return "str"
    return "int" if _INT.fullmatch(text) else "float" if _FLOAT.fullmatch(text) else "str"


def absolute_path(path: str | Path, folder: str | Path = ".") -> str:
    """Return a path that a user wrote, relative to `folder`, as an absolute one without links.

    A home directory or a link that cannot be resolved stays; opening the path reports it.
    """
    return os.path.realpath(os.path.join(folder, os.path.expanduser(path)))


def control_character(text: str) -> str | None:
    """Return the first character that is a control character, ends a line, or is not UTF-8."""
    found = (c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs"))
    return None if text.isprintable() else next(found, None)


def check_line(key: str, text: str) -> None:
    """Check that text is part of one line: a path or a word that goes into logs and scripts.

    Raises:
        ConfigError: it holds a control character, the end of a line, or bytes that are not UTF-8.
    """
    found = control_character(text)
    if found is not None:
        what = "bytes that are not UTF-8" if "\ud800" <= found <= "\udfff" else repr(found)
        raise ConfigError(f"{key}: {text!r} holds {what}; write it without control characters")


def valid_name(name: str) -> bool:
    """Return whether text can name a domain, a validation set or a text file.

    The name becomes part of metric names.
    """
    return bool(name) and name == name.strip() and "/" not in name and name.isprintable()


def check_name(key: str, name: str) -> None:
    """Check a name that a user gave.

    Raises:
        ConfigError: it is empty, begins or ends with white space, or holds a / or a character that
            is not printed.
    """
    if not valid_name(name):
        advice = "use letters, digits, - _ and . (it becomes part of metric names)"
        raise ConfigError(f"{key}: {name!r} is not a valid name; {advice}")


def visible(text: str) -> str:
    """Return text with each control character spelled out, so that it stays on its line."""
    return "".join(repr(c)[1:-1] if control_character(c) else c for c in text)


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that a misspelled one is most like, or None if none is similar."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def open_inside(folder: Path, name: str) -> io.FileIO:
    """Open a file that another file of its folder names, for reading.

    Raises:
        ConfigError: the name leads out of the folder, is a link, or is not that of a regular file.
        OSError: there is no such file, or it cannot be opened.
    """
    if name in ("", ".", "..") or "/" in name or control_character(name):
        raise ConfigError(f"it refers to the file {name!r:.100}, outside of its folder")
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        number = os.open(folder / name, flags)
    except OSError:
        if (folder / name).is_symlink():
            raise ConfigError(f"{name} is a symbolic link; copy the folder with cp -rL") from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ConfigError(f"{name} is not a regular file")
    return io.FileIO(number)
