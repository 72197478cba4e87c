#!/usr/bin/env python3
"""Remove held-out text from a .jsonl file of training text.

    python unseen.py en-zh.jsonl out/en-zh.jsonl --held-out en_test.jsonl zh_test.jsonl

A document loses the paragraphs that a held-out document has too, and a pair or an instruction with
such a paragraph is dropped. Otherwise a translation, or a paragraph that a help system repeats on
every page, would be in both. Paragraphs under 60 bytes, mostly headings, stay.
"""

import argparse
import json
from pathlib import Path

LEAST = 60
"""Bytes of the shortest paragraph that is removed."""


def paragraphs(text: str) -> list[str]:
    return text.split("\n")


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without(record: dict[str, str], held: set[str]) -> dict[str, str] | None:
    """Return the record without held-out paragraphs; None if nothing is left."""
    if "text" in record:
        text = "\n".join(
            paragraph for paragraph in paragraphs(record["text"]) if paragraph not in held
        )
        return record | {"text": text} if text.strip() else None
    return (
        None
        if any(paragraph in held for value in record.values() for paragraph in paragraphs(value))
        else record
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--held-out",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="files of documents to exclude",
    )
    arguments = parser.parse_args()
    held = {
        p
        for path in arguments.held_out
        for record in records(path)
        for p in paragraphs(record["text"])
        if len(p.encode()) >= LEAST
    }
    before = records(arguments.input)
    kept = [left for record in before if (left := without(record, held)) is not None]
    arguments.output.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8"
    )
    shorter = sum(len(record["text"]) for record in before if "text" in record) - sum(
        len(record["text"]) for record in kept if "text" in record
    )
    removed = f", {shorter:,} characters removed from documents" if shorter else ""
    print(
        f"{arguments.output}: {len(kept):,} of {len(before):,} records have text that is "
        f"not held out{removed}"
    )


if __name__ == "__main__":
    main()
