#!/usr/bin/env python3
"""Convert text to Megatron's .bin/.idx: `chatflow preprocess` under Megatron's name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    # The import is here because worker processes import this file again, and need none of it.
    from megatron_chatflow.cli.preprocess import main

    sys.exit(main(prog="preprocess_data.py"))
