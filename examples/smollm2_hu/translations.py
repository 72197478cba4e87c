#!/usr/bin/env python3
"""Makes instructions of translated paragraphs: python translations.py en-hu.jsonl out/en-hu.jsonl
out/instruct.jsonl

Every eighth pair becomes an instruction to translate, into Hungarian and into English in turn; the
others stay pairs.
"""

import argparse
import json
from pathlib import Path

EVERY = 8


def instruction(number: int, pair: dict[str, str]) -> dict[str, str]:
    if number % 2 == 0:
        return {
            "instruction": "Translate into Hungarian.",
            "input": pair["en"],
            "output": pair["hu"],
            "source": pair["source"],
        }
    return {
        "instruction": "Fordítsd le angolra.",
        "input": pair["hu"],
        "output": pair["en"],
        "source": pair["source"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("instructions", type=Path)
    arguments = parser.parse_args()
    pairs = [json.loads(line) for line in arguments.input.read_text(encoding="utf-8").splitlines()]
    chosen = [instruction(number, pair) for number, pair in enumerate(pairs[::EVERY])]
    kept = [pair for number, pair in enumerate(pairs) if number % EVERY]
    for path, records in ((arguments.pairs, kept), (arguments.instructions, chosen)):
        path.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
            encoding="utf-8",
        )
        print(f"{path}: {len(records):,} records")


if __name__ == "__main__":
    main()
