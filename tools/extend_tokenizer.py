#!/usr/bin/env python3
"""Extend a tokenizer: `chatflow tokenizer extend` under another name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_chatflow.cli.tokenizer import extend_main

    sys.exit(extend_main(prog="extend_tokenizer.py"))
