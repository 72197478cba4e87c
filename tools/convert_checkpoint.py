#!/usr/bin/env python3
"""Weights from Hugging Face and back: see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_chatflow.cli.convert import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
