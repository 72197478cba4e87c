"""``chatflow train``: the run."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_chatflow.config import CommandParser, make_parser, parse, resolve
from megatron_chatflow.distributed.launch import read_launch
from megatron_chatflow.errors import EXIT_PREEMPTED, RunError
from megatron_chatflow.report import console
from megatron_chatflow.utils.logging import configure_logging

EPILOG = """examples:
  {call} --config run.yaml --curriculum curriculum.yaml --save runs/zh --load runs/zh
  torchrun --nproc-per-node 2 -m megatron_chatflow train --config run.yaml
  srun --ntasks-per-node 8 {call} --config run.yaml      # in a SLURM job: one task per GPU

exit codes: 0 finished, 1 failed, 2 the settings cannot be used and nothing was written, 3 stopped
early by a signal or --exit-duration-in-mins: run the same command again to resume
"""


def parser() -> CommandParser:
    """Return the parser of the command line."""
    return make_parser(
        "chatflow train",
        "Train a model on a blend that a curriculum moves, or resume training.",
        EPILOG,
        command="train",
    )


@console.lossy_output()
def main(argv: Sequence[str]) -> int:
    """Check everything, then train."""
    launch = read_launch()
    config, _ = parse(parser(), argv, resolve=lambda config, _: resolve(config, launch.world_size))
    configure_logging(config.logging.log_level, rank=launch.rank)
    from megatron_chatflow.training.trainer import Trainer

    trainer = Trainer(config, launch)
    trainer.load_data()
    trainer.resolve_resume_point()
    with trainer.session():
        try:
            trainer.init_distributed()
            trainer.confirm_resume_point()
            trainer.build()
            return 0 if trainer.fit() else EXIT_PREEMPTED
        except RunError as error:
            if launch.rank == 0:
                console.complain(f"chatflow train: stopped: {error}")
            return error.exit_code
