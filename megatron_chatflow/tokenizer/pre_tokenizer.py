r"""Split patterns of a byte-level `tokenizer.json`, changed so that marks count as letters.

GPT-2's pattern and most patterns after it take words as runs of `\p{L}`, which combining marks
(`\p{M}`) are not. So they cut Thai, Hindi, Khmer, Hebrew with points and others within words, and
no token can cross a cut. Here the marks of given scripts join the letters of the pattern, and the
zero-width joiner and non-joiner join them after a letter or a mark of these scripts. A text that
has none of the two is split exactly as before: the changed parts match where the old ones did.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tokenizers

from megatron_chatflow.errors import TokenizerError
from megatron_chatflow.tokenizer.unicode_scripts import ZERO_WIDTH, Letters, letters_of

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What a `ByteLevel` step with `use_regex` splits by."""

_LETTERS = re.compile(r"\\p\{(?:L|Lo|Letter|Other_Letter)\}")
_ATOM = re.compile(
    r"\\p\{\^?\w+\}|\\.|\[\^?\]?(?:\\p\{\^?\w+\}|\\.|\[:\^?\w+:\]|[^\]\\\[])*\]", re.DOTALL
)


def steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a pre-tokenizer in order, those of sequences one by one."""
    if step is not None and step["type"] == "Sequence":
        for inner in step["pretokenizers"]:
            yield from steps(inner)
    elif step is not None:
        yield step


def cut_scripts(step: dict[str, Any] | None, scripts: Iterable[str]) -> list[str]:
    """Return those of the scripts whose words the pre-tokenizer cuts at marks or joiners."""
    if step is None:
        return []
    model = {"type": "BPE", "vocab": {}, "merges": []}
    content = json.dumps({"version": "1.0", "pre_tokenizer": step, "model": model})
    split = tokenizers.Tokenizer.from_str(content).pre_tokenizer.pre_tokenize_str

    def is_cut(letters: Letters) -> bool:
        between = [*letters.marks, *ZERO_WIDTH]
        return any(len(split(letters.letter + char + letters.letter)) > 1 for char in between)

    return [script for script in scripts if is_cut(letters_of(script))]


def join_marks(path: str, step: dict[str, Any], scripts: Sequence[str]) -> dict[str, Any]:
    """Return a pre-tokenizer of the same patterns, with the marks of the scripts as letters.

    Args:
        path: of the tokenizer, for messages.
        step: the pre-tokenizer of the `tokenizer.json`.
        scripts: names of scripts that it cuts at marks.

    Raises:
        TokenizerError: its patterns are of another form.
    """
    joined = [new for each in steps(step) for new in _joined(path, each, scripts)]
    result = {"type": "Sequence", "pretokenizers": joined}
    if still := cut_scripts(result, scripts):
        raise TokenizerError(
            f"{path}: its pre-tokenizer cuts {', '.join(still)} words at combining marks, and no "
            "pattern of it has letters as \\p{L}, which the marks could join; give a "
            "tokenizer that "
            "splits by GPT-2's or LLaMA-3's pattern, or --characters"
        )
    return result


def _joined(path: str, step: dict[str, Any], scripts: Sequence[str]) -> list[dict[str, Any]]:
    if step["type"] == "Split" and "Regex" in step["pattern"]:
        return [step | {"pattern": {"Regex": _with_marks(step["pattern"]["Regex"], scripts)}}]
    if step["type"] != "ByteLevel" or not step.get("use_regex", True):
        return [step]
    if step["add_prefix_space"]:
        raise TokenizerError(
            f"{path}: add_prefix_space true, with which the pattern of ByteLevel cannot take the "
            f"marks of {', '.join(scripts)} as letters; set it to false in tokenizer.json, or give "
            "--characters"
        )
    pattern = {"Regex": _with_marks(GPT2_PATTERN, scripts)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, step | {"use_regex": False}]


def _with_marks(pattern: str, scripts: Sequence[str]) -> str:
    found = [letters_of(script) for script in scripts]
    marks = _ranges(char for letters in found for char in letters.marks + letters.signs)
    behind = _ranges(char for letters in found for char in letters.all)

    def changed(atom: re.Match[str]) -> str:
        text = atom.group()
        if not _LETTERS.search(text) or "&&" in text:
            return text
        if text.startswith("[^"):
            return f"{text[:-1]}{marks}]"
        letter = f"{text[:-1]}{marks}]" if text.startswith("[") else f"[{text}{marks}]"
        return f"(?:{letter}|(?<=[{behind}])[{_ranges(ZERO_WIDTH)}])"

    return _ATOM.sub(changed, pattern)


def _ranges(chars: Iterable[str]) -> str:
    """Return characters as the inside of a class of a regular expression, for all engines."""
    points = sorted(set(map(ord, chars)))
    opens = [p for p in points if p - 1 not in set(points)]
    stops = [p for p in points if p + 1 not in set(points)]
    pairs = zip(map(_escaped, opens), map(_escaped, stops), strict=True)
    return "".join(a if a == b else f"{a}-{b}" for a, b in pairs)


def _escaped(point: int) -> str:
    return f"\\u{point:04x}" if point < 0x10000 else chr(point)
