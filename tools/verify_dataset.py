#!/usr/bin/env python3
"""Says whether a corpus is sound: see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_chatflow.cli.corpus import verify_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(verify_main())
