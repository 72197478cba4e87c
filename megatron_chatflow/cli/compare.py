"""``chatflow compare``: whether two run directories are the same run, bit for bit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow.cli.run_command import run_command
from megatron_chatflow.config import CommandParser
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.report.metrics_file import read_records

EPILOG = """examples:
  {call} runs/a runs/b                   # all records, and the checkpoints that both have
  {call} runs/a runs/b --iteration 100   # up to iteration 100, and its checkpoint

exit codes: 0 the same, 1 different (the first difference is printed), 2 not two runs that can be
compared
"""


def parser(prog: str = "chatflow compare") -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog, "Compare the metrics and checkpoints of two runs, bit for bit.", EPILOG
    )
    parser.usage = f"{parser.call} RUN RUN [flags]"
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="a run directory (--save of a training)"
    )
    parser.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="compare only up to this iteration, and its checkpoint",
    )
    parser.check = lambda args: (
        () if len(args.runs) == 2 else ["give two RUNs, the --save folders of trainings"]
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "chatflow compare") -> int:
    """Compare; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(prog, lambda: _compare(parser(prog).parse(words)))


def _compare(args: argparse.Namespace) -> int:
    a, b = args.runs
    found = next(differences(a, b, args.iteration), None)
    print(f"different: {found}" if found else f"the same: {a} and {b}")
    return 1 if found else 0


def differences(a: Path, b: Path, last: int | None) -> Iterator[str]:
    """Iterate over the differences: first of the records, then of the checkpoints.

    Raises:
        ConfigError: the two cannot be compared.
    """
    yield from _record_differences(_records(a, last), _records(b, last))
    shared = sorted(set(_checkpoints(a)) & set(_checkpoints(b)))
    if last is not None:
        if last not in shared:
            raise ConfigError(
                f"no checkpoint of iteration {last} in both runs; those in both are "
                f"{', '.join(map(str, shared)) or 'none'}"
            )
        shared = [last]
    if not shared:
        raise ConfigError(
            f"{a} and {b} have no checkpoint of one iteration; save both runs at the same iteration"
        )
    for iteration in shared:
        print(f"comparing the checkpoints of iteration {iteration}", file=sys.stderr, flush=True)
        yield from _checkpoint_differences(_checkpoints(a)[iteration], _checkpoints(b)[iteration])


def _records(run: Path, last: int | None) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without what differs between equal runs."""
    path = run / "metrics.jsonl"
    try:
        lines, bad = read_records(path)
    except OSError as error:
        raise ConfigError(
            f"{run} is not a run directory: metrics.jsonl cannot be read "
            f"({error.strerror}); give what was --save of a training"
        ) from None
    if bad:
        raise ConfigError(
            f"{path}: line {bad[0]} is not a record; resume the run, which moves it to "
            f"metrics.jsonl.bad"
        )
    records = [{k: v for k, v in line.items() if k not in ("time", "branch")} for line in lines]
    return [record for record in records if last is None or record["iteration"] <= last]


def _record_differences(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[str]:
    for x, y in zip(a, b, strict=False):
        if json.dumps(x) != json.dumps(y):
            key = next(key for key in [*x, *y] if json.dumps(x.get(key)) != json.dumps(y.get(key)))
            yield (
                f"metrics.jsonl at iteration {x['iteration']}: {key} is {x.get(key)} and "
                f"{y.get(key)}"
            )
    if len(a) != len(b):
        yield f"metrics.jsonl has {len(a)} and {len(b)} records"


def _checkpoints(run: Path) -> dict[int, Path]:
    from megatron_chatflow.checkpoint.run_directory import complete_iterations, iteration_folder

    return {i: iteration_folder(run, i) for i in complete_iterations(run)}


def _checkpoint_differences(a: Path, b: Path) -> Iterator[str]:
    import torch

    from megatron_chatflow.checkpoint.run_directory import read_state
    from megatron_chatflow.checkpoint.tensor_reader import read_common, read_tensors, tensor_names

    try:
        states = [read_state(folder) for folder in (a, b)]
        names = [tensor_names(folder) for folder in (a, b)]
        common = [read_common(folder) for folder in (a, b)]
    except ChatflowError as error:
        raise ConfigError(f"a checkpoint cannot be read: {error}") from None
    # The settings, as config.yaml, are what the runs were asked for, not what came of it. The
    # lineage has random names and shows whether a run was sent back.
    for key in sorted({*states[0], *states[1]} - {"settings", "lineage"}):
        if states[0].get(key) != states[1].get(key):
            yield f"{a.name}/state.json: {key} is not the same"
    if names[0] != names[1]:
        yield f"{a.name}: {min(set(names[0]) ^ set(names[1]))} is in one of them only"
    if repr(common[0]) != repr(common[1]):
        yield f"{a.name}/common.pt: the optimizer's settings are not the same"
    for (name, x), (_, y) in zip(read_tensors(a, names[0]), read_tensors(b, names[0]), strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            yield f"{a.name}: {name} is {list(x.shape)} {x.dtype} and {list(y.shape)} {y.dtype}"
        elif not torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8)):
            place = (
                int((x.flatten().view(torch.uint8) != y.flatten().view(torch.uint8)).nonzero()[0])
                // x.element_size()
            )
            yield (
                f"{a.name}: {name} differs first at element {place}: "
                f"{x.flatten()[place].item()} and {y.flatten()[place].item()}"
            )
