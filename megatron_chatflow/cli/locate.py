"""``chatflow locate``: which documents a sample holds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chatflow.checkpoint.run_directory import read_settings
from megatron_chatflow.config import CommandParser, DataConfig, make_parser, parse, resolve_data
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.report import console
from megatron_chatflow.utils.user_files import read_text

if TYPE_CHECKING:
    from megatron_chatflow.curriculum import BlendPlan

EPILOG = """examples:
  {call} --checkpoint runs/zh --iteration 57
  {call} --checkpoint runs/zh --sample 912
  {call} --config run.yaml --curriculum curriculum.yaml --iteration 57

exit codes: 0 printed, 2 the settings cannot be used, or the run has no such sample
"""
_EXCERPT = 160


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "chatflow locate",
        "Show which documents of which domain a sample or an iteration holds, and their text.",
        EPILOG,
        command="locate",
    )
    parser.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="every sample of this iteration (the first is 1), with the start of each document",
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="this sample (the first is 0), with its full text"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="RUN",
        help="a run directory: its config.yaml and plan.json, with amendments",
    )
    parser.check = lambda args: _check(parser, args)
    return parser


def _check(parser: CommandParser, args: argparse.Namespace) -> Iterator[str]:
    if {"iteration", "sample"} & parser.wrong:
        return
    if args.iteration is None and args.sample is None:
        yield "--iteration or --sample is missing; give one of them"
    if args.iteration is not None and args.sample is not None:
        yield "--iteration and --sample are both given; drop one of them"


def main(argv: Sequence[str]) -> int:
    """Print domain, ordinal, epoch and documents of the samples, with their text."""
    reader = parser()
    run = getattr(reader.parse_and_collect(argv), "checkpoint", None)
    config, args = parse(
        reader,
        argv,
        read_settings(run) if run else None,
        resolve=lambda config, _: resolve_data(config),
    )
    from megatron_chatflow.data import BlendedDataset
    from megatron_chatflow.training.batch_schedule import count_iterations, samples_of_iteration
    from megatron_chatflow.training.data_setup import make_plan, open_inputs

    inputs = open_inputs(config)
    if args.checkpoint:
        plan = _saved_plan(Path(args.checkpoint) / "plan.json")
    else:
        plan = make_plan(config, inputs.curriculum, inputs.epoch_samples)
    if args.iteration is not None:
        history = _batches(config, args.checkpoint)
        last = count_iterations(history, plan.num_samples)
        if not 1 <= args.iteration <= last:
            raise ConfigError(
                f"iteration {args.iteration} is not in the run; give --iteration a "
                f"number from 1 to {last}"
            )
        start, stop = samples_of_iteration(history, args.iteration)
    else:
        if not 0 <= args.sample < plan.num_samples:
            raise ConfigError(
                f"sample {args.sample} is not in the run; give --sample a number from 0 "
                f"to {plan.num_samples - 1}"
            )
        start, stop = args.sample, args.sample + 1
    blend = BlendedDataset(plan, inputs.domains)
    domains, ordinals = plan.locate(start, stop)
    if args.iteration is not None:
        console.say(
            f"iteration {args.iteration}: samples {start} to {stop - 1}, stage "
            f"{plan.stage_at(start)}"
        )
    for n, number, ordinal in zip(range(start, stop), domains, ordinals, strict=True):
        origin = blend.provenance(n)
        name = plan.domain_names[number]
        console.say(f"sample {n}: domain {name}, ordinal {ordinal}, epoch {origin['epoch']}")
        most = None if args.sample is not None else _EXCERPT
        for document, first, last in origin["documents"]:
            text = _text(inputs, name, document, first, last, most)
            console.say(f"  document {document}, tokens {first} to {last - 1}: {text}")
    return 0


def _saved_plan(path: Path) -> BlendPlan:
    from megatron_chatflow.curriculum import BlendPlan

    try:
        text = read_text(path)
    except ConfigError as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); give --checkpoint the --save folder of a run"
        ) from None
    return BlendPlan.from_json(text)


def _batches(config: DataConfig, run: str | None) -> tuple[Any, ...]:
    """Return the batch sizes of the run: its latest checkpoint's, then those of its settings."""
    from megatron_chatflow.checkpoint.run_directory import find_checkpoint, read_state
    from megatron_chatflow.training.batch_schedule import batch_history

    folder = find_checkpoint(run, None) if run else None
    if folder is None:
        return batch_history(config)
    state = read_state(folder)
    return batch_history(
        config, state["batches"], state["iteration"], state["consumed_train_samples"]
    )


def _text(inputs: Any, name: str, document: int, first: int, last: int, most: int | None) -> str:
    """Return the text of a document's tokens first .. last - 1; only these are read."""
    if inputs.tokenizer is None:
        return f"(no text: give {inputs.tokenizer_flags})"
    import numpy as np

    dataset = inputs.domains[name].dataset
    (start,) = dataset.document_starts(np.array([document])).tolist()
    text = inputs.tokenizer.decode(dataset.tokens[start + first : start + last].tolist())
    return repr(text if most is None or len(text) <= most else text[:most] + "...")
