"""``chatflow evaluate``: a checkpoint on held-out text."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_chatflow.commands.common import run_values, usage_errors
from megatron_chatflow.config import UsageError, make_parser, parse, resolve
from megatron_chatflow.engine.launch import read_launch
from megatron_chatflow.report import console

EPILOG = """examples:
  chatflow evaluate --load runs/zh
  chatflow evaluate --load runs/zh --ckpt-step 100 --eval-iters 1000 --json
  torchrun --nproc-per-node 2 -m megatron_chatflow evaluate --load runs/zh --pipeline-model-parallel-size 2
"""


def main(argv: Sequence[str]) -> int:
    """Print loss, perplexity and bits per byte of each domain's held-out part and of each named validation set."""
    parser = make_parser(
        "chatflow evaluate",
        "Loss, perplexity and bits per byte of a checkpoint on each domain's validation part and on the curriculum's named validation sets. "
        "Settings come from RUN/config.yaml.",
        EPILOG,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    with usage_errors():
        config, args = parse(parser, argv)
        if not config.checkpoint.load:
            raise UsageError("load is missing; give --load RUN, the folder that was --save of a run")
        config, args = parse(parser, argv, run_values(config.checkpoint.load, keep_layout=False))
        launch = read_launch()
        config = resolve(config, launch.world_size)
        from megatron_chatflow.training.inputs import open_inputs

        inputs = open_inputs(config, held_out=True)
    from megatron_chatflow.evaluation.session import open_model

    with open_model(config, launch, inputs) as session:
        names = tuple(inputs.held_out)
        from megatron_chatflow.evaluation.loss import evaluate_domains
        from megatron_chatflow.training.domain_loss import by_domain, loss_values

        most = config.validation.eval_iters * config.training.global_batch_size
        step, shape = session.forward_step(names), session.shape
        sums = evaluate_domains(step, session.model, inputs.held_out, names, most, config.training.micro_batch_size, shape, session.device)
        results = {name: values for name, values in by_domain(names, sums).items() if values["tokens"]}
        if launch.rank == 0:
            if args.json:
                console.say(
                    json.dumps({"checkpoint": str(session.checkpoint), "iteration": session.iteration, "validation": results}, ensure_ascii=False)
                )
            else:
                console.say(f"{session.checkpoint}")
                for line in console.validation_lines(session.iteration, results, loss_values(sums[: len(inputs.domains)].sum(0))):
                    console.say(line)
    return 0
