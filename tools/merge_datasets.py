#!/usr/bin/env python3
"""Several corpora to one: see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_chatflow.cli.corpus import merge_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(merge_main())
