"""``chatflow sweep``: sizes x lengths x shares x seeds as one command that can be killed."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chatflow.config import CommandParser
from megatron_chatflow.config.arguments import positive_int
from megatron_chatflow.errors import EXIT_FAILED, EXIT_PREEMPTED, ConfigError
from megatron_chatflow.report import console

if TYPE_CHECKING:
    from megatron_chatflow.cli.sweep_runner import Outcome
    from megatron_chatflow.planner.sweep_file import Sweep
    from megatron_chatflow.planner.sweep_plan import PlannedRun

EPILOG = """examples:
  {call} sweep.yaml --dry-run                # runs, tokens, FLOPs; writes nothing
  {call} sweep.yaml --dry-run --measure      # also hours: times some steps of each size
  {call} sweep.yaml --jobs 2                 # two runs at a time; run it again to continue
  {call} sweep.yaml --slurm --nodes 1 -- --partition=gpu --time=12:00:00

sweep.yaml (docs/scaling_laws.md explains it):
  base: run.yaml                             # settings of every run, with a curriculum
  runs: runs/sweep                           # folder of the run directories and of runs.csv
  sizes:
    small: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, lr: 4e-3}
    large: {num_layers: 8, hidden_size: 128, num_attention_heads: 8, lr: 2e-3}
  tokens: [1e6, 2e6, 4e6]                    # cooldown branches of one trunk
  shares: {zh90: {zh: 0.9, en: 0.1}, zh70: {zh: 0.7, en: 0.3}}
  target: zh
  keep: [en]

exit codes: 0 all runs have finished, 1 some failed (run it again to retry them), 2 the file cannot
be used, 3 stopped by a signal: run it again to continue
"""


def parser() -> CommandParser:
    """Return the parser of the command line, without the words for sbatch."""
    parser = CommandParser(
        "chatflow sweep",
        "Train sizes x lengths x shares x seeds, and write the table that `chatflow fit` reads.",
        EPILOG,
    )
    parser.usage = "chatflow sweep SWEEP [flags]"
    parser.add_argument("sweep", nargs="*", metavar="YAML", help="the sweep file")
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="runs at a time on this machine; they divide its cores and GPUs. Default: 1.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run; write and start nothing"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --dry-run: train some steps of each size in a temporary folder, and estimate "
        "the hours",
    )
    parser.add_argument(
        "--table", action="store_true", help="only write the table of the finished runs"
    )
    _add_slurm_flags(parser)
    parser.check = _check
    return parser


def _add_slurm_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("SLURM", "one array job; words after `--` go to sbatch")
    group.add_argument(
        "--slurm", action="store_true", help="submit an array job in place of running here"
    )
    for flag, default, text in (
        ("--nodes", 1, "nodes of each task"),
        ("--ntasks-per-node", None, "processes per node; by default the file's `processes`"),
        ("--cpus-per-task", 8, "cores per process"),
        ("--lead-seconds", 300, "seconds before the time limit at which a run saves and exits"),
    ):
        end = f". Default: {default}." if default else ""
        group.add_argument(
            flag, type=positive_int, default=default, metavar="N", help=f"{text}{end}"
        )


def _check(args: argparse.Namespace) -> Sequence[str]:
    errors = []
    if len(args.sweep) != 1:
        errors.append("give one YAML, the sweep file")
    if args.measure and not args.dry_run:
        errors.append("--measure has no effect without --dry-run; add --dry-run")
    if args.table and (args.dry_run or args.slurm):
        errors.append("--table only writes the table; drop --dry-run and --slurm")
    return errors


def main(argv: Sequence[str]) -> int:
    """Check the file, then print, submit or run what it describes."""
    from megatron_chatflow.cli.slurm_script import split_words

    words, sbatch = split_words(argv)
    args = parser().parse(words)
    if sbatch and not args.slurm:
        raise ConfigError(f"{sbatch[0]}: words after -- are for sbatch; add --slurm")
    from megatron_chatflow.cli import sweep_state
    from megatron_chatflow.planner.sweep_file import load_sweep
    from megatron_chatflow.planner.sweep_plan import plan_runs

    sweep = load_sweep(args.sweep[0])
    groups = plan_runs(sweep)
    runs = [run for group in groups for run in group]
    if args.dry_run:
        return _dry_run(sweep, groups, args)
    if args.table:
        # The tasks of an array job may end at the same time: the last one has all runs.
        with sweep_state.exclusive(sweep.runs, "table.lock", wait=True):
            return _write_table(sweep, runs)
    with sweep_state.exclusive(sweep.runs):
        vocab_size = _open_data(sweep, runs)
        sweep_state.prepare(sweep, runs)
        if args.slurm:
            from megatron_chatflow.cli.sweep_array import submit

            return submit(sweep, groups, args, sbatch)
        from megatron_chatflow.cli.sweep_runner import SweepRunner

        _check_starts(sweep, runs)
        runner = SweepRunner(sweep, runs, args.jobs, lambda run: run.flops(vocab_size), sys.stderr)
        outcome = runner.run()
    console.say(str(runner.table))
    return _report(outcome, sweep, len(runs))


def _write_table(sweep: Sweep, runs: Sequence[PlannedRun]) -> int:
    from megatron_chatflow.cli.sweep_state import Table, is_finished

    table = Table(sweep, runs)
    for run in runs:
        if is_finished(run, sweep.runs / run.name):
            table.add(run)
    table.write()
    console.say(str(table))
    return 0


def _open_data(sweep: Sweep, runs: Sequence[PlannedRun]) -> int:
    """Open the corpora and the tokenizer as a run would; returns the size of the vocabulary."""
    from megatron_chatflow.training.data_setup import open_inputs

    config = next(run for run in runs if not run.is_leg).config
    base = config.replace(curriculum=sweep.base.data.curriculum)
    inputs = open_inputs(base, held_out=True)
    if not inputs.held_out:
        raise ConfigError(
            f"{sweep.source}: no domain has held-out text, so runs would have no losses to fit; "
            'give the base `data: {split: "95,5,0"}` or the curriculum held-out corpora'
        )
    return inputs.vocab_size


def _check_starts(sweep: Sweep, runs: Sequence[PlannedRun]) -> None:
    from megatron_chatflow.checkpoint.run_directory import complete_iterations

    for run in runs:
        if (
            run.start is not None
            and not complete_iterations(sweep.runs / run.name)
            and not complete_iterations(Path(run.start))
        ):
            raise ConfigError(
                f"{sweep.source}: start: {run.start} holds no checkpoint, and {run.name} would "
                "start with its weights; train it first, or correct the path"
            )


def _dry_run(sweep: Sweep, groups: Sequence[Sequence[PlannedRun]], args: argparse.Namespace) -> int:
    """Print what would run, and where asked how long it would take."""
    from megatron_chatflow.cli.sweep_state import is_finished
    from megatron_chatflow.planner.sweep_plan import length_name
    from megatron_chatflow.report import columns

    runs = [run for group in groups for run in group]
    vocab_size = _open_data(sweep, runs)
    rows = [("size", "N", "runs", "lengths", "tokens", "FLOPs")]
    for size in sweep.sizes:
        those = [run for run in runs if run.size == size]
        rows.append(
            (
                size,
                f"{those[0].params(vocab_size):,}",
                str(sum(not run.is_leg for run in those)),
                " ".join(length_name(tokens) for tokens in sweep.tokens),
                f"{sum(run.own_tokens for run in those):,}",
                f"{sum(run.flops(vocab_size) for run in those):.3g}",
            )
        )
    results = [run for run in runs if not run.is_leg]
    trained = sum(run.own_tokens for run in runs)
    apart = sum(run.tokens for run in results)
    rows.append(
        (
            "total", "", str(len(results)), "", f"{trained:,}",
            f"{sum(run.flops(vocab_size) for run in runs):.3g}",
        )
    )  # fmt: skip
    console.say("\n".join(columns.line(row, columns.widths(rows)) for row in rows))
    legs = len(runs) - len(results)
    if legs:
        console.say(
            f"{len(results)} runs are branches of {len(groups)} trunks ({legs} legs): "
            f"{1 - trained / apart:.0%} fewer tokens than {len(results)} separate runs"
        )
    finished = [run for run in runs if is_finished(run, sweep.runs / run.name)]
    if finished:
        console.say(f"{len(finished)} of {len(runs)} directories are finished already")
    if args.measure:
        from megatron_chatflow.cli.sweep_measure import estimate

        left = [run for run in runs if run not in finished]
        console.say(estimate(sweep, left, args.jobs))
    else:
        console.say("hours: not estimated; --measure times some steps of each size")
    return 0


def _report(outcome: Outcome, sweep: Sweep, count: int) -> int:
    """Print how the sweep ended; returns the exit code."""
    from megatron_chatflow.cli.sweep_state import LOG

    for name, reason in outcome.failed.items():
        console.complain(f"{name} failed, {reason} (log: {sweep.runs / name / LOG})")
    for name, number in Counter(outcome.blocked.values()).items():
        console.complain(f"{number} runs did not start because {name} failed")
    if outcome.stopped:
        console.complain(
            f"stopped: {len(outcome.finished)} of {count} runs have finished; run the same "
            "command again to continue"
        )
        return EXIT_PREEMPTED
    if outcome.failed:
        console.complain("run the same command again to retry what failed")
        return EXIT_FAILED
    return 0
