#!/usr/bin/env python3
"""Fit scaling laws: `chatflow fit` under another name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_chatflow.cli.fit import main

    sys.exit(main(prog="fit_scaling_law.py"))
