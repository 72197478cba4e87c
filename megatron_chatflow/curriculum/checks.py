"""Checks of single values of a curriculum file; what is wrong is reported by a function `fail`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from megatron_chatflow.utils.user_files import closest, control_character

Fail = Callable[[str, str, str], NoReturn]
"""Raises the error for (key, problem, advice)."""


def parse_position(value: Any, key: str, fail: Fail) -> tuple[int | float, bool]:
    """Return where a stage begins, and whether that is a percentage of the run."""
    relative = isinstance(value, str) and value.rstrip().endswith("%")
    if relative:
        try:
            value = float(value.rstrip()[:-1])
        except ValueError:
            fail(key, f"{value!r} is not a percentage", "write one such as 40%")
        value = int(value) if value.is_integer() else value
    number = check_number(value, key, fail)
    if number < 0:
        fail(key, f"{number}{'%' * relative} is negative", "write 0 or more")
    if relative and number > 100:
        fail(key, f"{number}% is beyond the end of the run", "write at most 100%")
    return number, relative


def check_number(value: Any, key: str, fail: Fail) -> int | float:
    """Return a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(
            key,
            f"a number is expected, found {kind_name(value)} {value!r}",
            "write a number, without quotes",
        )
    if not abs(value) <= 1e300:
        fail(
            key,
            f"{value:.3} is not a finite number"
            if isinstance(value, float)
            else "the number is too large",
            "write a finite one",
        )
    return value


def check_one_line(text: str, key: str, fail: Fail) -> None:
    """Refuse text that holds a control character."""
    if control_character(text) is not None:
        fail(key, f"{text!r} holds a control character", "write it without")


def check_choice(value: Any, choices: Sequence[str], key: str, fail: Fail) -> str:
    """Return a word if it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        fail(
            key,
            f"{value!r} is unknown{suggestion(value, choices)}",
            f"choose one of {', '.join(choices)}",
        )
    return value


def check_keys(mapping: Mapping, names: Sequence[str], prefix: str, fail: Fail) -> None:
    """Refuse keys of a mapping that are not among `names`."""
    for name in mapping:
        if name not in names:
            fail(
                f"{prefix}{name}",
                f"unknown key{suggestion(name, names)}",
                f"the keys here are {', '.join(names)}",
            )


def suggestion(value: Any, names: Iterable[str]) -> str:
    """Return the end of a message that suggests the most similar name, or nothing."""
    near = closest(str(value), names, cutoff=0.5)
    return f", did you mean {near!r}?" if near else ""


def kind_name(value: Any) -> str:
    """Return what a YAML value is, in words."""
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)
