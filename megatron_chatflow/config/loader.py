"""YAML sections and flags in, one `Config` out; flags win. Whatever is not understood is refused
with the nearest known name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow.config.schema import Config, section_of, sections
from megatron_chatflow.config.schema.section import base_type, choices_of, type_hints
from megatron_chatflow.config.unsupported_flags import REFUSED
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.utils.user_files import check_line, closest, dump_yaml, load_yaml, read_text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass: {field name: text}."""
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


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """``; did you mean X?`` or nothing. The dashes of flags, which all have in common, do not
    count.
    """
    words = {word.lstrip("-"): word for word in known}
    near = closest(name.lstrip("-"), words)
    return f"; did you mean {words[near]}?" if near is not None else ""


def convert(name: str, value: Any, cls: type) -> Any:
    """One value from YAML as the field's type. Raises ConfigError that names the setting, the value
    and what is wanted.
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
        int: "a whole number",
        float: "a number",
        str: "text",
        list[int]: "a list of whole numbers",
        list[str]: "a list of texts",
    }[base]


def _yaml_values(path: Path) -> dict[str, Any]:
    """{field name: value} of a YAML file with sections; relative paths in it are relative to its
    folder.
    """
    try:
        text = read_text(path)
    except ChatflowError as error:
        raise ConfigError(
            f"--config {path}: cannot be read ({error}); give the path of a YAML file"
        ) from None
    try:
        document = load_yaml(text)
    except ChatflowError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"--config {path}: holds {type(document).__name__}, not sections; write e.g. "
            f"`model: {{num_layers: 4}}`"
        )
    known, values = dict(sections()), {}
    for section, content in document.items():
        if section not in known:
            cure = (
                f"; {section} belongs into the section {section_of()[section]}"
                if section in section_of()
                else nearest(str(section), known)
            )
            raise ConfigError(
                f"{path}: unknown section "
                f"{section!r}{cure or '; the sections are ' + ', '.join(known)}"
            )
        if content is None:
            continue
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path}: section {section} holds {content!r}, not settings; write "
                f"`{section}: {{name: value}}`"
            )
        names = [f.name for f in dataclasses.fields(known[section])]
        for name, value in content.items():
            if name not in names:
                other = section_of().get(name)
                cure = (
                    f"; it belongs into the section {other}"
                    if other
                    else nearest(str(name), section_of())
                )
                flag = REFUSED.get("--" + str(name).replace("_", "-"))
                raise ConfigError(
                    f"{path}: unknown setting {name!r} in section {section}"
                    + (f": {flag}" if flag else cure or "; `chatflow train --help` lists them")
                )
            try:
                values[name] = _absolute(
                    name, convert(name, value, known[section]), known[section], path.parent
                )
            except ChatflowError as error:
                raise ConfigError(f"{path}: {section}.{error}") from None
    return values


def _absolute(name: str, value: Any, cls: type, folder: Path) -> Any:
    (meta,) = (f.metadata for f in dataclasses.fields(cls) if f.name == name)
    if meta.get("path") and value is not None:
        return str((folder / Path(value).expanduser()).resolve())
    if name == "data_path" and value is not None:
        return [
            v if _is_number(v) else str((folder / Path(v).expanduser()).resolve()) for v in value
        ]
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def make_parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser that knows ``--config`` and a flag for every setting; commands add their own
    arguments to it.
    """
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config YAML] [flags]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help="settings by section; flags win over it")
    for section, cls in sections():
        group = parser.add_argument_group(section, cls.__doc__)
        for f in dataclasses.fields(cls):
            _add_flag(group, f, cls)
    return parser


def _add_flag(group: Any, f: dataclasses.Field, cls: type) -> None:
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
    parser: argparse.ArgumentParser, argv: Sequence[str], base: Mapping[str, Any] | None = None
) -> tuple[Config, argparse.Namespace]:
    """Flags and the file named by ``--config``, over `base` ({field: value}, e.g. a checkpoint's
    settings).

    Returns the configuration as written (see `derive.resolve` for what follows from it) and the
    command's own arguments. Raises ConfigError for an unknown or refused flag, an unknown key, and
    a value of the wrong kind.
    """
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.split("=")[0]
        if flag in REFUSED:
            raise ConfigError(f"{flag}: {REFUSED[flag]}")
        flags = [option for action in parser._actions for option in action.option_strings]
        if flag.startswith("-"):
            raise ConfigError(
                f"unknown flag "
                f"{flag}{nearest(flag, flags) or f'; `{parser.prog} --help` lists the flags'}"
            )
        raise ConfigError(f"unexpected argument {word!r}; `{parser.prog} --help` shows the usage")
    values = dict(base or {})
    if args.config:
        values.update(_yaml_values(Path(args.config)))
    for _, cls in sections():
        for f in dataclasses.fields(cls):
            written = getattr(args, f.name)
            delattr(args, f.name)
            if written is not None:
                try:
                    values[f.name] = _absolute(
                        f.name, convert(f.name, written, cls), cls, Path.cwd()
                    )
                except ChatflowError as error:
                    raise ConfigError(
                        "--" + str(error).replace(f.name, f.name.replace("_", "-"), 1)
                    ) from None
    return Config().replace(**values), args


def load_values(path: Path) -> dict[str, Any]:
    """{field name: value} of a resolved ``config.yaml``; raises ConfigError where it cannot be
    read.
    """
    return _yaml_values(path)


def to_yaml(config: Config) -> str:
    """The configuration as the YAML text that `parse` reads back to the same values."""
    return dump_yaml(dataclasses.asdict(config))
