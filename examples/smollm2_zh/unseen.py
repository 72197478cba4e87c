#!/usr/bin/env python3
"""Takes held-out text out of a .jsonl file to learn from: python unseen.py en-zh.jsonl
out/en-zh.jsonl --held-out en_test.jsonl zh_test.jsonl

A document loses the paragraphs that a held-out document has too, and a pair or an instruction with
such a paragraph is left out. A translation, or a sentence that a help system repeats on every page,
would otherwise be learnt and then judged by. Paragraphs under 60 bytes, headings mostly, stay.
"""

import argparse
import json
from pathlib import Path

LEAST = 60
"""Bytes of a paragraph that counts."""


def paragraphs(text: str) -> list[str]:
    return text.split("\n")


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without(record: dict[str, str], held: set[str]) -> dict[str, str] | None:
    """The record without held-out paragraphs; None where nothing is left of it."""
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
        help="files of documents that are not to be learnt from",
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
    told = f", {shorter:,} characters taken out of documents" if shorter else ""
    print(
        f"{arguments.output}: {len(kept):,} of {len(before):,} records have text that is "
        f"not held out{told}"
    )


if __name__ == "__main__":
    main()
