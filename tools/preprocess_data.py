#!/usr/bin/env python3
"""Text to Megatron's .bin/.idx: see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    # Here, and not above: worker processes import this file again, and need none of it.
    from megatron_chatflow.cli.preprocess import main

    sys.exit(main())
