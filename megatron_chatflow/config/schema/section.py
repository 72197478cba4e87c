"""The base class of the sections and the helpers that declare their fields.

A section is a frozen dataclass whose field names are Megatron's argument names. The string under a
field is its documentation and becomes the ``--help`` text of its flag (`config/loader.py`). A
`Literal` annotation holds the choices of a field. Nothing here imports numpy, torch or megatron.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

_T = TypeVar("_T")


def path_field() -> Any:
    """Declare an optional path; a relative one in a YAML file is relative to the file's folder."""
    return field(default=None, metadata={"path": True})


def switch_field(*, off: str) -> Any:
    """Declare a switch that is on by default and that Megatron turns off with another flag."""
    return field(default=True, metadata={"off": off})


def flag_field(flag: str) -> Any:
    """Declare a switch, off by default, whose flag Megatron spells irregularly."""
    return field(default=False, metadata={"flag": flag})


def flag_name(name: str) -> str:
    """Return the flag of a setting: ``num_layers`` -> ``--num-layers``."""
    return "--" + name.replace("_", "-")


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """Return {field name: type} of a dataclass, with all names resolved."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def base_type(hint: Any) -> tuple[Any, bool]:
    """Return (the type without None, whether None is allowed)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (base,) = (t for t in typing.get_args(hint) if t is not type(None))
        return base, True
    return hint, False


def choices_of(cls: type, name: str) -> tuple[str, ...]:
    """Return the choices of a field, in order; nothing where its type is not a `Literal`."""
    base, _ = base_type(type_hints(cls)[name])
    return typing.get_args(base) if typing.get_origin(base) is typing.Literal else ()


def convert_to(cls: type[_T], instance: Any, **changes: Any) -> _T:
    """Copy a dataclass to a subclass of its class, with some fields changed."""
    values = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
    return cls(**values | changes)


@dataclass(frozen=True)
class Section:
    """One section of the configuration."""

    _positive: ClassVar[tuple[str, ...]] = ()
    """Fields that must be larger than zero."""
    _intervals: ClassVar[tuple[str, ...]] = ()
    """Fields that must be at least 1 where they are given."""

    def validate(self) -> list[str]:
        """Return what is wrong with this section alone: one message per error, without a newline.

        Checks between sections are in `config/validate.py`.
        """
        errors = []
        for f in dataclasses.fields(self):
            name, value = f.name, getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            given = f"{name} is {value}; give {flag_name(name)} a"
            if name in self._positive and value <= 0:
                errors.append(
                    f"{name} is {value or 'missing'}; give {flag_name(name)} a positive number"
                )
            elif name in self._intervals and value < 1:
                errors.append(f"{given} positive number or leave it out")
            elif value < 0:
                errors.append(f"{given} number that is not negative")
        return errors
