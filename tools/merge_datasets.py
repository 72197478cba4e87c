#!/usr/bin/env python3
"""Merge corpora: `chatflow corpus merge` under Megatron's name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_chatflow.cli.corpus import merge_main

    sys.exit(merge_main(prog="merge_datasets.py"))
