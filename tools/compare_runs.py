#!/usr/bin/env python3
"""Compare two runs: `chatflow compare` under another name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_chatflow.cli.compare import main

    sys.exit(main(prog="compare_runs.py"))
