"""What the long-running test programs share: their command line, and tables of what they did."""

from __future__ import annotations

import argparse
import os
import signal
from collections import Counter
from collections.abc import Mapping


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with --seed; the program adds how long to run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random choices. Default: 1.")
    return parser


def prepare_process() -> None:
    """Set what the ranks inherit: one thread each, and signals that are not ignored."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # nohup ignores SIGHUP, a shell's `&` SIGINT; the ranks would inherit that
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def markdown(tables: Mapping[str, Counter[str]]) -> str:
    """Tables of counts for docs/reliability.md."""
    return "\n\n".join(
        "\n".join(
            [
                f"| {title} | times |",
                "|---|---|",
                *(f"| {name} | {count} |" for name, count in sorted(counts.items())),
            ]
        )
        for title, counts in tables.items()
    )
