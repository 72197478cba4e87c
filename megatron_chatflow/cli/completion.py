"""``chatflow completion``: the script that completes commands, flags and files in a shell."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from megatron_chatflow.__main__ import COMMANDS
from megatron_chatflow.config import CommandParser
from megatron_chatflow.config.schema import section_of, sections
from megatron_chatflow.config.schema.section import choices_of

SHELLS = ("bash", "zsh")
EPILOG = """examples:
  eval "$({call} bash)"                                  # in ~/.bashrc
  {call} zsh > ~/.zsh/completions/_chatflow      # in a folder of $fpath

exit codes: 0 printed, 2 another shell
"""
_FILES = ("PATH", "FILE", "YAML", "PNG", "PREFIX", "TABLE")
_FOLDERS = ("DIR", "RUN")


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser("chatflow completion", "Print the completion script of a shell.", EPILOG)
    parser.usage = "chatflow completion {bash,zsh}"
    parser.add_argument("shell", nargs="*", metavar="SHELL", help="bash or zsh")
    parser.check = lambda args: (
        ()
        if len(args.shell) == 1 and args.shell[0] in SHELLS
        else [f"SHELL: give one of {', '.join(SHELLS)}"]
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the script."""
    (shell,) = parser().parse(argv).shell
    import shtab

    print(shtab.complete(_all_commands(), shell))
    return 0


def _all_commands() -> argparse.ArgumentParser:
    """Return one parser with every command as a subparser."""
    root = argparse.ArgumentParser("chatflow")
    groups = {"": root.add_subparsers(metavar="command")}
    for name, (place, text) in COMMANDS.items():
        group, _, command = name.rpartition(" ")
        if group not in groups:
            parent = groups[""].add_parser(group, help=f"commands about a {group}")
            groups[group] = parent.add_subparsers(metavar="command")
        groups[group].add_parser(
            command, help=text, add_help=False, parents=[_command_parser(place)]
        )
    return root


def _command_parser(place: str) -> argparse.ArgumentParser:
    import shtab

    module, function = place.split(".")
    command = importlib.import_module(f"megatron_chatflow.cli.{module}")
    parser = getattr(command, function.replace("main", "parser"))()
    classes = dict(sections())
    for action in parser._actions:
        if action.dest in section_of() and action.nargs != 0:
            action.choices = choices_of(classes[section_of()[action.dest]], action.dest) or None
        if action.dest == "shell":
            action.choices = SHELLS
        if action.metavar in (*_FILES, *_FOLDERS):
            action.complete = shtab.FILE if action.metavar in _FILES else shtab.DIRECTORY
    return parser
