"""The argument parser of every command.

It differs from argparse in three ways. All errors of a command line are collected and reported
together. `--help` shows the common flags in two screens, `--help-all` shows every flag. The
examples name the command as it was called: `chatflow preprocess`, or `tools/preprocess_data.py`.
"""

from __future__ import annotations

import argparse
import copy
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from megatron_chatflow.errors import ErrorCollector
from megatron_chatflow.utils.user_files import closest

_HELP_COLUMN = 34
_LONGEST_BRIEF = 100


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are collected in `errors`.

    Attributes:
        call: how a shell starts the command.
        errors: what is wrong with the last command line that was parsed.
        wrong: destinations of the flags whose values cannot be used.
        advanced: destinations of the flags that only `--help-all` shows.
        unsupported: {flag: why it is not supported, and what to do}.
        check: yields a message for each error in the parsed arguments.
    """

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        """Make a parser without arguments; ``{call}`` in `epilog` is the command."""
        self.call = f"python tools/{prog}" if prog.endswith(".py") else prog
        super().__init__(
            prog=prog,
            usage=f"{self.call} [flags]",
            description=description,
            epilog=epilog.replace("{call}", self.call),
            formatter_class=_Formatter,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.errors = ErrorCollector()
        self.wrong: set[str] = set()
        self.advanced: set[str] = set()
        self.unsupported: Mapping[str, str] = {}
        self.check: Callable[[argparse.Namespace], Iterable[str]] = lambda _: ()
        self.add_argument("-h", "--help", action=_Help, help="show the common flags and exit")
        self.add_argument("--help-all", action=_HelpAll, help="show every flag and exit")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line.

        Raises:
            ConfigErrors: flags are unknown, missing, or have values that cannot be used.
        """
        arguments = self.parse_and_collect(argv)
        self.errors.raise_all()
        return arguments

    def parse_and_collect(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line; what is wrong with it is in `errors`, and nothing is raised."""
        self.errors, self.wrong = ErrorCollector(), set()
        required = [a for a in self._actions if a.option_strings and a.required]
        for action in required:
            action.required = False  # checked below: argparse stops at the first error
        namespace = argparse.Namespace()
        try:
            _, unknown = self.parse_known_args(argv, namespace)
        except argparse.ArgumentError as error:
            self._collect(error)
            return namespace
        finally:
            for action in required:
                action.required = True
        self._report_unknown(argv, unknown)
        for action in required:
            if getattr(namespace, action.dest) is None and action.dest not in self.wrong:
                flag, what = action.option_strings[0], action.metavar or "VALUE"
                self.errors.add(f"{flag} is missing; give {flag} {what}")
                self.wrong.add(action.dest)
        self.errors.add(*self.check(namespace))
        return namespace

    def flags(self) -> list[str]:
        """Return every flag that is shown by `--help-all`, and its opposite."""
        return [option for action in self._actions for option in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it exits."""
        raise argparse.ArgumentError(None, message)

    def format_help(self, everything: bool = False) -> str:
        """Return the text of `--help`, or of `--help-all`."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        left_out = 0
        for group in self._action_groups:
            actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
            shown = [a for a in actions if everything or a.dest not in self.advanced]
            left_out += len(actions) - len(shown)
            if not shown:
                continue
            formatter.start_section(group.title)
            formatter.add_text(group.description if everything else None)
            formatter.add_arguments(shown if everything else [_brief(a) for a in shown])
            formatter.end_section()
        if left_out:
            formatter.add_text(f"{self.call} --help-all shows {left_out} more flags.")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _collect(self, error: argparse.ArgumentError) -> None:
        name = f"{error.argument_name}: " if error.argument_name else ""
        self.errors.add(f"{name}{error.message}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.dest in self.wrong:
            return action.default
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self._collect(error)
            self.wrong.add(action.dest)
            return action.default

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            self._collect(error)
            self.wrong.add(action.dest)
            return 0

    def _report_unknown(self, argv: Sequence[str], unknown: Iterable[str]) -> None:
        """Collect an error per unknown flag, and per word that is not the value of one."""
        position, after_flag = -1, -1
        for word in unknown:
            position = next(i for i in range(position + 1, len(argv)) if argv[i] == word)
            if word.startswith("-") and not _is_number(word):
                self._report_flag(word.split("=")[0])
                after_flag = position
            elif position == after_flag + 1 and after_flag >= 0:
                after_flag = position
            else:
                self.errors.add(
                    f"unexpected argument {word!r}; `{self.call} --help` shows the usage"
                )

    def _report_flag(self, flag: str) -> None:
        for spelling in (flag, flag.replace("_", "-")):
            if spelling in self.unsupported:
                self.errors.add(f"{spelling}: {self.unsupported[spelling]}")
                return
        guess = nearest(flag, self.flags())
        self.errors.add(
            f"unknown flag {flag}{guess or f'; `{self.call} --help-all` lists the flags'}"
        )
        if guess:
            self.wrong |= {
                a.dest for a in self._actions if guess.split()[-1][:-1] in a.option_strings
            }


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_HELP_COLUMN)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap paragraphs without indented lines, and keep examples as they are."""
        return "\n\n".join(
            paragraph
            if any(line.startswith(" ") for line in paragraph.splitlines())
            else textwrap.fill(paragraph, width, initial_indent=indent, subsequent_indent=indent)
            for paragraph in text.strip("\n").split("\n\n")
        )


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        print(parser.format_help(), end="")
        raise SystemExit(0)


class _HelpAll(_Help):
    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        print(parser.format_help(everything=True), end="")
        raise SystemExit(0)


def _brief(action: argparse.Action) -> argparse.Action:
    """Return the action with the first clause of its help, its default and its choices."""
    text = action.help or ""
    if len(text) <= _LONGEST_BRIEF:
        return action
    action = copy.copy(action)
    brief = text.partition(". ")[0].partition("; ")[0].rstrip(".") + "."
    for start in (" Default: ", " One of "):
        found = text.partition(start)[2].partition(". ")[0].partition("; ")[0].rstrip(".")
        if found not in ("", "off"):
            brief += f"{start}{found}."
    action.help = brief
    return action


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?``, or nothing. The leading dashes of flags do not count."""
    words = {word.lstrip("-"): word for word in known}
    near = closest(name.lstrip("-"), words)
    return f"; did you mean {words[near]}?" if near is not None else ""


def number(
    kind: type[int] | type[float], accepts: Callable[[Any], bool], what: str
) -> Callable[[str], Any]:
    """Return an argparse type for numbers that `accepts` is true of, described by `what`."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}; give {what}")
        return value

    return convert


positive_int = number(int, lambda n: n > 0, "a positive integer")
non_negative_int = number(int, lambda n: n >= 0, "an integer from 0 up")
positive_float = number(float, lambda x: 0 < x < float("inf"), "a positive number")
non_negative_float = number(float, lambda x: 0 <= x < float("inf"), "a number from 0 up")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
