#!/usr/bin/env python3
"""A tokenizer for a new language out of the one that a model has: see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_chatflow.cli.tokenizer import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
