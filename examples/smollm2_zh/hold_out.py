#!/usr/bin/env python3
"""Sets documents of a .jsonl file aside: python hold_out.py corpora/zh.jsonl zh_train.jsonl
zh_test.jsonl --bytes 60000

The documents with the smallest hashes are held out, as many as fill the bytes, so the same file is
always split alike; the rest keeps its order.
"""

import argparse
import hashlib
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--bytes", type=int, required=True, help="size of the held-out file")
    parser.add_argument(
        "--source",
        default="",
        help="leave out the documents whose `source` does not begin with this",
    )
    arguments = parser.parse_args()
    lines = [
        line
        for line in arguments.input.read_bytes().splitlines(keepends=True)
        if json.loads(line)["source"].startswith(arguments.source)
    ]
    held, size = set(), 0
    for number in sorted(range(len(lines)), key=lambda i: hashlib.sha256(lines[i]).digest()):
        if size + len(lines[number]) <= arguments.bytes:
            held.add(number)
            size += len(lines[number])
    arguments.train.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in held))
    arguments.test.write_bytes(b"".join(lines[i] for i in sorted(held)))
    print(f"{arguments.test}: {len(held):,} of {len(lines):,} documents held out, {size:,} bytes")


if __name__ == "__main__":
    main()
