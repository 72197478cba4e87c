"""``chatflow train``: the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from megatron_chatflow.config import CommandParser, make_parser, parse, resolve
from megatron_chatflow.distributed.launch import read_launch
from megatron_chatflow.errors import EXIT_PREEMPTED, is_shared
from megatron_chatflow.report import console

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
    from megatron_chatflow.training.data_setup import open_inputs
    from megatron_chatflow.training.setup import (
        assemble,
        claim,
        find_sound_start,
        find_start,
        join,
        look_ahead,
        saving,
    )

    begin = time.perf_counter()
    inputs = open_inputs(config, held_out=bool(config.validation.eval_interval))
    start = find_start(config, inputs)
    outlook = look_ahead(start, inputs)

    def say(text: str) -> None:
        if launch.rank == 0:
            console.say(text)

    def stopped(error: Exception) -> int:
        if launch.rank == 0:
            console.complain(f"chatflow train: stopped: {error}")
        return 1

    for note in (*inputs.notes, *outlook.notes):
        say(note)
    say(
        f"{len(inputs.domains)} domains, {outlook.total:,} samples of "
        f"{config.data.seq_length} tokens, opened in {time.perf_counter() - begin:.2f} s"
    )
    from megatron_chatflow.checkpoint.lease import Lease, LeaseLostError
    from megatron_chatflow.distributed.process_groups import shut_down
    from megatron_chatflow.training.signals import Stop
    from megatron_chatflow.utils.files import WriteError

    lifeline, save = None, config.checkpoint.save
    with (
        ExitStack() as signals
    ):  # handled to the very end: torchrun ends ranks that look for a reason
        try:
            with (
                Lease(Path(save)) if save else nullcontext() as lease,
                saving(config, lease) as saver,
            ):
                lifeline = join(launch, config)
                limit = config.training.exit_duration_in_mins
                stop = signals.enter_context(Stop(limit, lease))
                claim(lease, say)
                if lease is not None:  # another run may have saved since
                    start = find_start(config, inputs)
                start = find_sound_start(config, inputs, start)
                outlook = look_ahead(start, inputs)
                for note in start.notes:
                    say(note)
                run = assemble(launch, inputs, start, outlook, say)
                from megatron_chatflow.training.replica_check import ReplicaError
                from megatron_chatflow.training.train_step import NonFiniteError
                from megatron_chatflow.training.trainer import train

                try:
                    return 0 if train(run, stop, saver) else EXIT_PREEMPTED
                except (NonFiniteError, ReplicaError) as error:
                    return stopped(error)
        except (WriteError, LeaseLostError) as error:
            return stopped(error)
        except Exception as error:
            if lifeline is None or is_shared(error):
                raise
            lifeline.fail(error)
        finally:
            if lifeline is not None:
                lifeline.close()
            shut_down()
