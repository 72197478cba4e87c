#!/usr/bin/env python3
"""Convert weights from and to Hugging Face: `chatflow convert` under another name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_chatflow.cli.convert import main

    sys.exit(main(prog="convert_checkpoint.py"))
