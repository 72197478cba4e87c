"""``chatflow plan``: the curriculum as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_chatflow.config import CommandParser, make_parser, parse, resolve_data
from megatron_chatflow.report import console

EPILOG = """examples:
  {call} --config run.yaml --curriculum curriculum.yaml
  {call} --curriculum curriculum.yaml --seq-length 2048 --global-batch-size 512 \\
      --train-samples 3900000 --plot plan.png
  # what resuming with an edited curriculum would read
  {call} --config run.yaml --load runs/zh --curriculum edited.yaml --amend-curriculum

exit codes: 0 printed (with or without warnings), 2 the plan cannot be met or the settings cannot
be used
"""


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "chatflow plan",
        "Show the share, samples, tokens and epochs of each domain in each stage, and which "
        "domains run out.",
        EPILOG,
        command="plan",
    )
    parser.add_argument("--plot", metavar="PNG", help="also plot the shares over the run")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the plan; returns 0 also when it has warnings, 2 when it cannot be met."""
    config, args = parse(parser(), argv, resolve=lambda config, _: resolve_data(config))
    from megatron_chatflow.curriculum import check_exhaustion, forecast, preset_lines, share_curve
    from megatron_chatflow.report.plan_table import plan_table
    from megatron_chatflow.training.data_setup import check_tokens, make_plan, open_inputs
    from megatron_chatflow.training.resume_point import resolve_resume_point

    inputs = open_inputs(config)
    if config.checkpoint.load:
        plan = resolve_resume_point(config, inputs, plan_only=True).blend.plan
    else:
        plan = make_plan(config, inputs.curriculum, inputs.epoch_samples)
    checked = check_tokens(inputs)
    outlook = forecast(plan, inputs.epoch_samples)
    sizes = {"num_samples": plan.num_samples, "seq_length": plan.seq_length, "end": outlook.end}
    for line in preset_lines(plan.preset) if plan.preset else ():
        console.say(line)
    console.say(plan_table(outlook.stages, outlook.domains, **sizes, warnings=outlook.warnings))
    for note in (*inputs.notes, checked):
        console.say(note)
    check_exhaustion(plan, inputs.epoch_samples)
    if args.plot:
        from megatron_chatflow.report.plots import plot_plan

        samples, shares = share_curve(plan)
        tokens = {row.name: row.tokens for row in outlook.domains}
        plot_plan(
            args.plot,
            samples=samples,
            shares=shares,
            names=plan.domain_names,
            stages=plan.stages,
            tokens=tokens,
        )
        console.say(f"plot written to {args.plot}")
    return 0
