"""How two tokenizers compare on some languages, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_HEADER = (
    "held out",
    "documents",
    "tokens",
    "change",
    "tokens/word",
    "tokens/character",
    "bytes/token",
    "same tokens",
    "given back",
)


def fertility_table(languages: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table and of the examples.

    Args:
        languages: comparison of each language, as
        `megatron_chatflow.tokenizer.fertility.Comparison.to_json` gives it.
    """
    rows = [_HEADER, *(_row(name, language) for name, language in languages.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
    for name, language in languages.items():
        for example in language["examples"]:
            yield f"{name}: {example['before']}"
            yield f"{' ' * len(name)}  {example['after']}"


def _row(name: str, language: Mapping[str, Any]) -> tuple[str, ...]:
    before, after, documents = language["before"], language["after"], language["documents"]

    def both(key: str, spec: str) -> str:
        return " -> ".join(
            "-" if side[key] is None else format(side[key], spec) for side in (before, after)
        )

    return (
        name,
        f"{documents:,}",
        both("tokens", ","),
        f"{language['change']:+.1%}",
        both("tokens_per_word", ".2f"),
        both("tokens_per_character", ".3f"),
        both("bytes_per_token", ".2f"),
        f"{language['unchanged_documents']:,}",
        both("round_trips", ","),
    )
