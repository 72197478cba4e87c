"""``chatflow plot``: a run as a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_chatflow.cli.run_command import note, run_command
from megatron_chatflow.config import CommandParser
from megatron_chatflow.errors import ConfigError, DataError

EPILOG = """examples:
  {call} runs/zh                       # writes runs/zh/run.png
  {call} runs/zh --output zh.png       # also while the run continues

exit codes: 0 written, 2 there is nothing to plot
"""


def parser(prog: str = "chatflow plot") -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog,
        "Plot a run from its metrics.jsonl: the share of every domain, realized and scheduled, and "
        "its loss in training and on held-out text.",
        EPILOG,
    )
    parser.usage = f"{parser.call} RUN [flags]"
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="a run directory (--save of a training)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="the file to write. Default: RUN/run.png."
    )
    parser.check = lambda args: (
        () if len(args.runs) == 1 else ["give one RUN, the --save folder of a training"]
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "chatflow plot") -> int:
    """Plot; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(prog, lambda: _plot(parser(prog).parse(words)))


def _plot(args: argparse.Namespace) -> int:
    from megatron_chatflow.report.metrics_file import read_records
    from megatron_chatflow.report.plots import plot_run

    (run,) = args.runs
    metrics, output = run / "metrics.jsonl", args.output or run / "run.png"
    try:
        records, bad = read_records(metrics)
    except OSError as error:
        raise ConfigError(
            f"{metrics}: {error.strerror}; give the --save folder of a training"
        ) from None
    try:
        plot_run(output, records)
    except DataError as error:
        raise ConfigError(f"{metrics}: {error}; train first, or restore the file") from None
    if bad:
        some = f"line {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        note(f"{metrics}: {some}: not a record, left out")
    print(f"{output}: {len(records):,} records drawn")
    return 0
