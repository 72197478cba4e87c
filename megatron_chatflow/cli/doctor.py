"""``chatflow doctor``: what this machine can run, with the reason for each answer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_chatflow.cli.diagnostics import Row
from megatron_chatflow.config import CommandParser, make_parser, parse
from megatron_chatflow.distributed.launch import node_name
from megatron_chatflow.report import console

EPILOG = """examples:
  {call}
  # with the corpora, and whether two checkpoints fit on the disk
  {call} --config run.yaml --curriculum curriculum.yaml --save runs/zh
  # inside a SLURM job: whether all nodes connect and have the same packages and corpora
  srun {call} --full --config run.yaml

exit codes: 0 training can run, 1 it cannot (the last line says why), 2 the settings cannot be used
"""


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "chatflow doctor",
        "Show what this machine can run, with the reason for each answer. Nothing is written.",
        EPILOG,
        command="doctor",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="also import torch and megatron-core and connect all processes of the job: some "
        "seconds more",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the table; returns 1 where training cannot run."""
    config, args = parse(parser(), argv)
    from megatron_chatflow.cli.diagnostics.corpora import (
        checkpoint_size,
        corpora,
        fingerprints,
        named_corpora,
    )

    prefixes = named_corpora(config)
    from megatron_chatflow.cli.diagnostics.devices import devices
    from megatron_chatflow.cli.diagnostics.host import machine
    from megatron_chatflow.cli.diagnostics.launcher import launcher
    from megatron_chatflow.cli.diagnostics.packages import packages, versions

    launch, launched = launcher()
    rows = (
        packages()
        + machine(config.checkpoint.save, checkpoint_size(config, prefixes), len(prefixes))
        + launched
    )
    rows += devices(full=args.full) + corpora(prefixes)
    if args.full and launch is not None:
        from megatron_chatflow.cli.diagnostics.rendezvous import meeting

        rows += meeting(launch, versions() | fingerprints(prefixes), config.parallel.init_timeout)
    wrong = [row for row in rows if row.wrong]
    if launch is None or launch.rank == 0:
        _print(rows, wrong)
    else:
        for row in wrong:
            console.complain(
                f"{node_name()}, rank {launch.rank}: {row.name.strip()} {row.value} ({row.reason})"
            )
    return 1 if wrong else 0


def _print(rows: Sequence[Row], wrong: Sequence[Row]) -> None:
    width = max(len(row.name) for row in rows)
    for row in rows:
        console.say(
            f"{row.name:<{width}}  {row.value}" + (f"  ({row.reason})" if row.reason else "")
        )
    why = "; ".join(f"{row.name.strip()} {row.value}" for row in wrong)
    console.say(f"training: cannot run, see above: {why}" if wrong else "training: can run")
