#!/usr/bin/env python3
"""Draws a run from its metrics.jsonl: the share of every domain, realized and scheduled, and its
loss in training and on held-out text.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_chatflow.errors import ChatflowError  # noqa: E402
from megatron_chatflow.report.metrics_file import read_records  # noqa: E402
from megatron_chatflow.report.plots import plot_run  # noqa: E402

EPILOG = """examples:
  python tools/plot_run.py runs/zh                       writes runs/zh/run.png
  python tools/plot_run.py runs/zh --output zh.png       also while the run goes on

exit codes: 0 drawn, 2 there is nothing to draw
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run directory (--save of a training)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="the file to write. Default: RUN/run.png."
    )
    args = parser.parse_args(argv)
    metrics, output = args.run / "metrics.jsonl", args.output or args.run / "run.png"
    try:
        records, bad = read_records(metrics)
        plot_run(output, records)
    except OSError as error:
        print(
            (
                f"plot_run.py: error: {error.filename}: {error.strerror}; give the --save "
                f"folder of a training"
            ),
            file=sys.stderr,
        )
        return 2
    except (KeyError, TypeError, AttributeError) as error:
        what = f"a record is not what a run writes ({error!r}); remove it, or restore the file"
        print(f"plot_run.py: error: {metrics}: {what}", file=sys.stderr)
        return 2
    except ChatflowError as error:
        print(
            f"plot_run.py: error: {metrics}: {error}; train first, or restore the file",
            file=sys.stderr,
        )
        return 2
    if bad:
        some = f"line {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        print(f"plot_run.py: {metrics}: {some}: not a record, left out", file=sys.stderr)
    print(f"{output}: {len(records):,} records drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
