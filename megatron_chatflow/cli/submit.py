"""``chatflow submit``: a run as a SLURM job."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_chatflow.cli.slurm_script import Job, render, split_words
from megatron_chatflow.config import CommandParser, Config, make_parser, parse, resolve
from megatron_chatflow.config.arguments import non_negative_int, positive_int
from megatron_chatflow.errors import ConfigError, ErrorCollector
from megatron_chatflow.report import console
from megatron_chatflow.utils.files import unwritable

EPILOG = """examples:
  {call} --config run.yaml --curriculum curriculum.yaml --save /shared/runs/zh --nodes 16 \\
      -- --partition=gpu --time=24:00:00
  {call} --config run.yaml --save /shared/runs/zh --load /shared/base --finetune \\
      --nodes 2 --dry-run
  {call} --config run.yaml --save /shared/runs/zh --nodes 4 --container chatflow.sqsh \\
      --mounts /shared:/shared

The settings are those of `chatflow train`. Words after `--` go to sbatch. The script is written to
SAVE/train.sbatch; the log is SAVE/slurm-<job>.log.

exit codes: 0 queued or printed, 1 sbatch did not take the job, 2 the settings cannot be used and
nothing was written
"""


def main(argv: Sequence[str]) -> int:
    """Check the settings, write the script, and give it to sbatch."""
    words, sbatch = split_words(argv)
    config, args = parse(parser(), words, resolve=_checked)
    job = _job(config, args, words, sbatch)
    script = render(job)
    if args.dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH; submit on a machine of the cluster, or print the script "
            "with --dry-run"
        )
    path = Path(job.save) / "train.sbatch"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise unwritable("save", path.parent, error) from None
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        console.complain(f"chatflow submit: sbatch did not take {path}: {done.stderr.strip()}")
        return 1
    number = done.stdout.strip().split(";")[0]
    console.say(
        f"job {number} is queued: {job.nodes * job.ntasks_per_node} processes on {job.nodes} nodes"
    )
    console.say(f"script: {path}\nlog:    {job.save}/slurm-{number}.log")
    console.say(f"end it: scancel {number}; save and requeue: scancel --signal=USR1 {number}")
    return 0


def parser() -> CommandParser:
    """Return the parser of the command line, without the words for sbatch."""
    parser = make_parser(
        "chatflow submit",
        "Check a run's settings, write its SLURM script, and queue it.",
        EPILOG,
        command="submit",
    )
    _add_flags(parser)
    parser.check = _check
    return parser


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes", type=positive_int, required=True, metavar="N", help="nodes of the job"
    )
    parser.add_argument(
        "--ntasks-per-node",
        type=positive_int,
        default=8,
        metavar="N",
        help="processes per node, one per GPU. Default: 8.",
    )
    parser.add_argument(
        "--gpus-per-node",
        type=non_negative_int,
        metavar="N",
        help="GPUs to request per node; the number of processes by default, 0 requests none",
    )
    parser.add_argument(
        "--cpus-per-task",
        type=positive_int,
        default=8,
        metavar="N",
        help="cores per process. Default: 8.",
    )
    parser.add_argument(
        "--lead-seconds",
        type=positive_int,
        default=300,
        metavar="N",
        help="seconds before the time limit at which the run saves and exits. Default: 300.",
    )
    parser.add_argument(
        "--container",
        metavar="IMAGE",
        help="image for srun --container-image (the pyxis plugin); `chatflow` from PATH by default",
    )
    parser.add_argument(
        "--mounts", metavar="FROM:TO", help="what the container sees, for srun --container-mounts"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script; write and submit nothing"
    )


def _check(args: argparse.Namespace) -> Iterator[str]:
    if args.mounts and not args.container:
        yield (
            f"--mounts {args.mounts} has no effect without --container; add --container IMAGE or "
            "drop --mounts"
        )


def _checked(config: Config, args: argparse.Namespace) -> Config:
    """Return `config`, unchanged, once it is checked for the processes of the job."""
    errors, where = ErrorCollector(), config.checkpoint
    if not where.save:
        errors.add(
            "save is missing: a job that was ended could not resume; give --save a folder that "
            "all nodes see"
        )
    for name in ("ckpt_step", "no_load_optim", "no_save_optim"):
        if getattr(where, name) not in (None, False):
            errors.add(
                f"{name} would hold for every new start of the job, not only the first; "
                f"drop --{name.replace('_', '-')}"
            )
    if args.nodes is not None:
        with errors.collect():
            resolve(config, args.nodes * args.ntasks_per_node)
    errors.raise_all()
    if not where.save_interval:
        console.complain(
            "note: no --save-interval, so a node failure loses everything since the last signal"
        )
    return config


def _job(
    config: Config, args: argparse.Namespace, words: Sequence[str], sbatch: Sequence[str]
) -> Job:
    assert config.checkpoint.save is not None  # _checked
    gpus = args.ntasks_per_node if args.gpus_per_node is None else args.gpus_per_node
    save = config.checkpoint.save
    assert save is not None, "`_checked` requires it"
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_flags(own)
    _, training = own.parse_known_args(list(words))
    return Job(
        words=training,
        save=save,
        folder=os.getcwd(),
        nodes=args.nodes,
        ntasks_per_node=args.ntasks_per_node,
        gpus_per_node=gpus,
        cpus_per_task=args.cpus_per_task,
        lead_seconds=args.lead_seconds,
        container=args.container,
        mounts=args.mounts,
        sbatch=sbatch,
    )
