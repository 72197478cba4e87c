#!/usr/bin/env python3
"""Plot a run: `chatflow plot` under another name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_chatflow.cli.plot import main

    sys.exit(main(prog="plot_run.py"))
