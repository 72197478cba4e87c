"""Run tools/preprocess_data.py as a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
LINE = json.dumps({"text": "x" * 1000}).encode() + b"\n"


def command(*arguments):
    return [sys.executable, str(TOOL), *map(str, arguments)]


def run(folder, *arguments, input=None):
    """Runs the tool in a folder, without the repository on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        input=input,
        capture_output=True,
        env=environment,
        timeout=60,
    )


def arguments(*more):
    return (
        "--input",
        "a.jsonl",
        "--output-prefix",
        "out/a",
        "--tokenizer-type",
        "ByteLevelTokenizer",
        *more,
    )
