"""Read the settings of a run from YAML sections and flags into one `Config`.

Flags win over the file. What is not known is an error that suggests the nearest known name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow.config.arguments import CommandParser, nearest
from megatron_chatflow.config.command_settings import common_settings_of, readers_of, settings_of
from megatron_chatflow.config.schema import Config, section_of, sections
from megatron_chatflow.config.schema.section import base_type, choices_of, type_hints
from megatron_chatflow.config.unsupported_flags import REFUSED
from megatron_chatflow.errors import ChatflowError, ConfigError, ErrorCollector
from megatron_chatflow.utils.user_files import (
    absolute_path,
    check_line,
    dump_yaml,
    load_yaml,
    read_text,
)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return {field name: the string under the field} of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for node, follower in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(follower, ast.Expr)
            and isinstance(follower.value, ast.Constant)
            and isinstance(node.target, ast.Name)
            and isinstance(follower.value.value, str)
        ):
            docs[node.target.id] = " ".join(follower.value.value.split())
    return docs


def convert(name: str, value: Any, cls: type) -> Any:
    """Return one value of a file or a flag as the field's type.

    Raises:
        ConfigError: it is of another kind; the message names the setting and the value.
    """
    base, optional = base_type(type_hints(cls)[name])
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{name} has no value; write one or leave the line out")
    choices = choices_of(cls, name)
    if choices:
        base = str
    wrong = ConfigError(f"{name}: {value!r} is not {_describe(base)}; write {_describe(base)}")
    if base is bool:
        if not isinstance(value, bool):
            raise wrong
    elif base in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise wrong
        try:
            number = float(value) if not isinstance(value, int) else value
        except ValueError:
            raise wrong from None
        if not math.isfinite(number) or (base is int and number != int(number)):
            raise wrong
        value = base(number)
    elif base is str:
        if not isinstance(value, str):
            raise wrong
        check_line(name, value)
        if choices and value not in choices:
            raise ConfigError(
                f"{name}: {value!r} is not known; write one of "
                f"{', '.join(choices)}{nearest(value, choices)}"
            )
    else:
        (item,) = typing.get_args(base)
        if not isinstance(value, list):
            raise wrong
        try:
            value = [item(v) for v in value]
        except (TypeError, ValueError):
            raise wrong from None
        for text in value if item is str else ():
            check_line(name, text)
    return value


def _describe(base: Any) -> str:
    return {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list[int]: "a list of integers",
        list[str]: "a list of texts",
    }[base]


def _yaml_values(path: Path, errors: ErrorCollector) -> dict[str, Any]:
    """Return {field name: value} of a YAML file, and add what is wrong with it to `errors`.

    Relative paths in the file are relative to its folder.
    """
    try:
        text = read_text(path)
    except ChatflowError as error:
        errors.add(f"--config {path}: cannot be read ({error}); give the path of a YAML file")
        return {}
    try:
        document = load_yaml(text)
    except ChatflowError as error:
        errors.add(f"--config {path}: {error}")
        return {}
    if document is None:
        return {}
    if not isinstance(document, dict):
        errors.add(
            f"--config {path}: holds {type(document).__name__}, not sections; write e.g. "
            f"`model: {{num_layers: 4}}`"
        )
        return {}
    known, values = dict(sections()), {}
    for section, content in document.items():
        if section not in known:
            guess = (
                f"; {section} belongs in the section {section_of()[section]}"
                if section in section_of()
                else nearest(str(section), known)
            )
            errors.add(
                f"{path}: unknown section "
                f"{section!r}{guess or '; the sections are ' + ', '.join(known)}"
            )
        elif content is not None and not isinstance(content, dict):
            errors.add(
                f"{path}: section {section} holds {content!r}, not settings; write "
                f"`{section}: {{name: value}}`"
            )
        for name, value in (
            content.items() if isinstance(content, dict) and section in known else ()
        ):
            try:
                values[name] = _yaml_value(str(section), known[section], name, value, path.parent)
            except ChatflowError as error:
                errors.add(f"{path}: {error}")
    return values


def _yaml_value(section: str, cls: type, name: Any, value: Any, folder: Path) -> Any:
    """Return the value of one key. Raises ConfigError that names the section and the key."""
    if name not in [f.name for f in dataclasses.fields(cls)]:
        other = section_of().get(name)
        guess = (
            f"; it belongs in the section {other}" if other else nearest(str(name), section_of())
        )
        refused = REFUSED.get("--" + str(name).replace("_", "-"))
        raise ConfigError(
            f"unknown setting {name!r} in section {section}"
            + (f": {refused}" if refused else guess or "; `chatflow train --help-all` lists them")
        )
    try:
        return _absolute(name, convert(name, value, cls), cls, folder)
    except ChatflowError as error:
        raise ConfigError(f"{section}.{error}") from None


def _absolute(name: str, value: Any, cls: type, folder: Path) -> Any:
    (meta,) = (f.metadata for f in dataclasses.fields(cls) if f.name == name)
    if meta.get("path") and value is not None:
        return absolute_path(value, folder)
    if name == "data_path" and value is not None:
        return [v if _is_number(v) else absolute_path(v, folder) for v in value]
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def make_parser(
    prog: str, description: str, epilog: str = "", *, command: str | None = None
) -> CommandParser:
    """Return a parser with ``--config`` and a flag for every setting that a command reads.

    Args:
        prog: the command as it was called.
        description: what the command does.
        epilog: examples and exit codes; ``{call}`` in it is the command as a shell starts it.
        command: its key in `command_settings.READS`; None reads every setting.
    """
    parser = CommandParser(prog, description, epilog)
    parser.usage = f"{prog} [--config YAML] [flags]"
    parser.unsupported = REFUSED
    parser.add_argument(
        "--config",
        metavar="YAML",
        help=(
            "file with the settings of a run; flags win over it. The complete file is checked; "
            "what this command does not read has no effect."
        ),
    )
    reads, common = settings_of(command), common_settings_of(command)
    for section, cls in sections():
        group = parser.add_argument_group(section, cls.__doc__)
        for f in dataclasses.fields(cls):
            _add_flag(group, f, cls, f.name in reads)
    parser.advanced |= reads - common
    parser.set_defaults(**{name: None for name in section_of()})
    return parser


def _add_flag(group: Any, f: dataclasses.Field, cls: type, is_read: bool) -> None:
    base, _ = base_type(type_hints(cls)[f.name])
    flag = f.metadata.get("flag") or "--" + f.name.replace("_", "-")
    text = field_docs(cls)[f.name].replace("%", "%%")
    default = f.default
    if base is bool:
        off = f.metadata.get("off") or ("--no-" + flag[2:])
        text += (
            f" Default: {'on' if default else 'off'}; {off if default else flag} turns it "
            f"{'off' if default else 'on'}."
        )
        text = text if is_read else argparse.SUPPRESS
        group.add_argument(flag, dest=f.name, action="store_const", const=True, help=text)
        group.add_argument(
            off, dest=f.name, action="store_const", const=False, help=argparse.SUPPRESS
        )
        return
    if default is not None and default != 0:
        text += f" Default: {default}."
    choices = choices_of(cls, f.name)
    if choices:
        base = str
        text += f" One of {', '.join(choices)}."
    text = text if is_read else argparse.SUPPRESS
    if typing.get_origin(base) is list:
        group.add_argument(flag, dest=f.name, nargs="+", metavar=f.name.upper(), help=text)
    else:
        group.add_argument(
            flag,
            dest=f.name,
            metavar={int: "N", float: "X", str: "NAME"}[base]
            if not f.metadata.get("path")
            else "PATH",
            help=text,
        )


def parse(
    parser: CommandParser,
    argv: Sequence[str],
    base: Mapping[str, Any] | None = None,
    *,
    resolve: Callable[[Config, argparse.Namespace], Any] | None = None,
) -> tuple[Any, argparse.Namespace]:
    """Read flags and the file that ``--config`` names, over the settings `base`.

    Args:
        parser: made by `make_parser`.
        argv: the command line, without the command.
        base: {field: value} that the file and the flags win over, e.g. a checkpoint's settings.
        resolve: fills in and checks the configuration, given the command's own arguments; its
            errors are reported with those of the command line and of the file.

    Returns:
        The configuration, as written or as `resolve` returns it, and the command's own arguments.

    Raises:
        ConfigErrors: everything that is wrong, one message each.
    """
    args = parser.parse_and_collect(argv)
    errors, values = parser.errors, dict(base or {})
    if getattr(args, "config", None):
        values.update(_yaml_values(Path(args.config), errors))
    for name, value in _flag_values(parser, args).items():
        values[name] = value
    config = Config().replace(**values)
    if resolve is None:
        errors.raise_all()
        return config, args
    found = ErrorCollector()
    with found.collect():
        resolved = resolve(config, args)
    # An error about a setting whose value could not be read says nothing new.
    errors.add(*(m for m in found.messages if not parser.wrong & _settings_in(m)))
    errors.raise_all()
    return resolved, args


def make_config(settings: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration of `settings` ({field: value}) over those of `base`.

    Raises:
        ConfigErrors: names of `settings` are unknown, or values are of the wrong kind.
    """
    values, classes, errors = dict(base or {}), dict(sections()), ErrorCollector()
    for name, value in settings.items():
        if name not in section_of():
            errors.add(f"unknown setting {name!r}{nearest(name, section_of())}")
            continue
        cls = classes[section_of()[name]]
        with errors.collect():
            values[name] = _absolute(name, convert(name, value, cls), cls, Path.cwd())
    errors.raise_all()
    return Config().replace(**values)


def _settings_in(message: str) -> set[str]:
    """Return the settings that a message names: its first word, flags, and names with a _."""
    words = re.findall(r"^\w+|\w+_\w+|--[\w-]+", message)
    return {word.lstrip("-").replace("-", "_") for word in words}


def _flag_values(parser: CommandParser, args: argparse.Namespace) -> dict[str, Any]:
    """Return {field name: value} of the flags that were given, and take them out of `args`."""
    values = {}
    shown = {a.dest for a in parser._actions if a.help != argparse.SUPPRESS}
    for name, section in section_of().items():
        cls, written = dict(sections())[section], getattr(args, name, None)
        if hasattr(args, name):
            delattr(args, name)
        if written is None:
            continue
        flag = "--" + name.replace("_", "-")
        if name not in shown:
            parser.errors.add(
                f"{flag}: {parser.prog} does not read this setting ({', '.join(readers_of(name))} "
                "do); drop the flag"
            )
            continue
        try:
            values[name] = _absolute(name, convert(name, written, cls), cls, Path.cwd())
        except ChatflowError as error:
            parser.errors.add(str(error).replace(name, flag, 1))
            parser.wrong.add(name)
    return values


def load_values(path: Path) -> dict[str, Any]:
    """Return {field name: value} of a file such as ``config.yaml``.

    Raises:
        ConfigErrors: it cannot be read, or something in it cannot be used.
    """
    errors = ErrorCollector()
    values = _yaml_values(path, errors)
    errors.raise_all()
    return values


def to_yaml(config: Config) -> str:
    """Return the YAML text that `parse` reads back to the same values."""
    return dump_yaml(dataclasses.asdict(config))
