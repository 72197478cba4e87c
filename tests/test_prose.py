"""Words that code, tests and pages do not use; docs/glossary.md has those that they use.

Python is read by tokens: comments, strings and identifiers (`goes_on` and `GoesOn` read as
"goes on"). Markdown and shell are read as they are.
"""

from __future__ import annotations

import io
import re
import subprocess
import token
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CHECKED = ("",)
"""Beginnings of the paths that are checked."""

EXEMPT = (r"tests/test_prose\.py", r"examples/\w+/data/.*", r"LICENSE")
"""Files that are not prose of this project, and this one."""

BANNED = {
    "cure|cures|cured|mend|mends|mended": "fix",
    "afresh|anew": "again, from scratch",
    "for ever": "forever",
    "told|tells": "reports, shows, determines",
    "heard|deaf": "received, blocked",
    "sign of life|signs of life": "heartbeat",
    "in peace": "cleanly",
    "stands|lies": "is",
    "beside": "next to, in addition to",
    "sound": "valid, intact",
    "durable": "flushed to disk",
    "goes on|go on|went on|going on": "continue",
    "the house": "the package layout",
    "rooms": "packages",
    "a sentence": "a message",
    "by itself|of its own": "separately, its own",
    "so many": "N",
    "whole": "entire, complete, all of; often nothing",
    "fault": "error, bug, failure",
}
"""Words and phrases, separated by |, and what to write instead."""

ALLOWED = (
    "fault injection",
    "sound file",
    "end of a sentence",
    "whole number",
    "whole numbers",
    '"whole"',
)
"""Exact phrases in which a banned word is right."""


PATTERNS = {
    instead: re.compile(
        rf"(?<![\w-])(?:{words})(?![\w-])".replace(" ", r"[\s\"'f]+"), re.IGNORECASE
    )
    for words, instead in BANNED.items()
}
ANY = re.compile("|".join(pattern.pattern for pattern in PATTERNS.values()), re.IGNORECASE)


@cache
def is_suspect(passage: str) -> bool:
    """Whether a passage has a banned word, perhaps in an allowed phrase."""
    return ANY.search(passage) is not None


def files() -> list[str]:
    """Return the text files of the repository that are checked, as relative paths."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    suffixes = (".py", ".md", ".sh", ".sbatch", ".yaml", ".yml", ".toml", ".txt", ".cff")
    return [
        path
        for path in listed
        if path.startswith(CHECKED)
        and (path.endswith(suffixes) or Path(path).name.startswith(("Dockerfile", "run")))
        and not any(re.fullmatch(rule, path) for rule in EXEMPT)
        and (ROOT / path).is_file()
    ]


def words_of(identifier: str) -> str:
    """Split an identifier into its words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", identifier.replace("_", " "))


def passages(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield (number of the first line, text) of everything in a file that people read."""
    if not path.endswith(".py"):
        yield 1, text
        return
    strings = {token.STRING, getattr(token, "FSTRING_MIDDLE", token.STRING)}
    ignored = {
        token.NL,
        getattr(token, "FSTRING_START", token.NL),
        getattr(token, "FSTRING_END", 0),
    }
    start, run = 1, ""
    kind_before = ""
    for found in tokenize.generate_tokens(io.StringIO(text).readline):
        if found.type == token.NAME:
            yield found.start[0], words_of(found.string)
        if found.type in ignored or (found.type == token.NEWLINE and kind_before == "comment"):
            run += "\n" * (found.type in (token.NL, token.NEWLINE))
            continue
        kind = (
            "comment"
            if found.type == token.COMMENT
            else ("string" if found.type in strings else "")
        )
        if kind and kind == kind_before:
            run += found.string if kind == "string" else found.string.lstrip("# ")
            continue
        yield start, run
        start, run, kind_before = found.start[0], found.string if kind else "", kind
    yield start, run


def findings(path: str, text: str) -> list[str]:
    """Return one message per banned word in the text of a file."""
    found = []
    for first, passage in passages(path, text):
        if not is_suspect(passage):
            continue
        for phrase in ALLOWED:
            passage = re.sub(
                re.escape(phrase).replace(r"\ ", r"\s+"),
                lambda match: re.sub(r"[^\n]", "-", match[0]),
                passage,
                flags=re.IGNORECASE,
            )
        for instead, pattern in PATTERNS.items():
            for match in pattern.finditer(passage):
                line = first + passage.count("\n", 0, match.start())
                found.append(f"{path}:{line}: {' '.join(match[0].split())!r}; write: {instead}")
    return found


@pytest.mark.parametrize("path", files())
def test_no_banned_word(path: str) -> None:
    assert findings(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.md", "The run goes\non."),
        ("a.py", "# It stands\n"),
        ("a.py", "x = 1  # the run goes\n# on\n"),
        ("a.py", "def test_a_run_that_goes_on(): ...\n"),
        ("a.py", "class FaultLine: ...\n"),
        ("a.py", "x = ('the ' f'whole {y}')\n"),
        ("a.py", "x = ('it goes '\n     'on')\n"),
        ("a.py", '"""Doc.\n\nIt is told.\n"""\n'),
    ],
)
def test_banned_words_are_found(path: str, text: str) -> None:
    assert len(findings(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.md", "fault injection, a default, wholesale, besides"),
        ("a.py", "import faulthandler\nx = default_whole_number = 1\n".replace("_whole", "")),
    ],
)
def test_other_words_pass(path: str, text: str) -> None:
    assert findings(path, text) == []
