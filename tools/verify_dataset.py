#!/usr/bin/env python3
"""Verify corpora: `chatflow corpus verify` under another name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_chatflow.cli.corpus import verify_main

    sys.exit(verify_main(prog="verify_dataset.py"))
