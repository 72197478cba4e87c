"""``chatflow evaluate``: a checkpoint on held-out text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_chatflow.cli.common import install_engine, prefixed_errors
from megatron_chatflow.cli.model_source import (
    add_use_ema,
    find_source,
    parse_with_source,
    settings_alone,
)
from megatron_chatflow.config import CommandParser, Config, make_parser
from megatron_chatflow.distributed.launch import Launch, read_launch
from megatron_chatflow.report import console
from megatron_chatflow.report.evaluation_table import changes, comparison_lines
from megatron_chatflow.utils.logging import configure_logging

EPILOG = """examples:
  {call} --load runs/zh
  {call} --load runs/zh --ckpt-step 100 --eval-iters 1000 --json
  # what was forgotten and what was learned; what the running mean of the weights gains
  {call} --load runs/zh --reference runs/base
  {call} --load runs/zh --use-ema --reference runs/zh
  # raw text: comparable across tokenizers; also for a Hugging Face folder
  {call} --load runs/zh --text en=en.jsonl --text zh=zh.txt
  {call} --load SmolLM2-135M --text zh=zh.jsonl --seq-length 1024
  {call} --load runs/zh --average-checkpoints 6
  torchrun --nproc-per-node 2 -m megatron_chatflow evaluate --load runs/zh \\
      --pipeline-model-parallel-size 2

exit codes: 0 evaluated, 2 the settings cannot be used
"""


def main(argv: Sequence[str]) -> int:
    """Print loss, perplexity and bits per byte of each validation set, or of raw text."""
    launch = read_launch()
    source, config, args = parse_with_source(parser(), argv, launch.world_size)
    configure_logging(rank=launch.rank, stream="stderr")
    from megatron_chatflow.evaluation.eval_data import (
        corpora,
        raw_text,
        read_named_texts,
        same_corpora,
    )

    subjects = [source.subject(config, launch.world_size, args.average_checkpoints, args.use_ema)]
    texts = read_named_texts(args.text)
    materials = [
        raw_text(subjects[0], texts, args.document_start) if texts else corpora(subjects[0].config)
    ]
    if args.reference:
        with prefixed_errors(f"reference {args.reference}: "):
            subjects.append(_find_reference(args.reference, subjects[0].config, launch))
            other = (
                raw_text(subjects[1], texts, args.document_start)
                if texts
                else same_corpora(materials[0], subjects[1].config)
            )
            materials.append(other)
    install_engine()
    from megatron_chatflow.evaluation.evaluate import measure
    from megatron_chatflow.evaluation.model_session import open_model, open_process_groups
    from megatron_chatflow.training.metrics import by_domain, loss_values

    most = (
        None
        if texts
        else config.validation.eval_iters * subjects[0].config.training.global_batch_size
    )
    measured: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with open_process_groups(subjects[0].config, launch) as device:
        for subject, material in zip(subjects, materials, strict=True):
            session = open_model(subject, material.vocab_size, device)
            sums = measure(session, material.sources, material.token_bytes, most)
            values = {
                name: row
                for name, row in by_domain(tuple(material.sources), sums).items()
                if row["tokens"]
            }
            measured.append((values, loss_values(sums[: material.domains].sum(0))))
            del session
    if launch.rank == 0:
        same_tokens = (
            len({material.tokenizer and material.tokenizer.fingerprint() for material in materials})
            == 1
        )
        change = (
            changes(measured[0][0], measured[1][0], same_tokens=same_tokens)
            if args.reference
            else {}
        )
        if args.json:
            measured_model, *reference = [
                {
                    "checkpoint": subject.name,
                    "iteration": subject.iteration,
                    "validation": values,
                    "notes": material.notes,
                }
                for subject, material, (values, _) in zip(
                    subjects, materials, measured, strict=True
                )
            ]
            console.say(
                json.dumps(
                    measured_model
                    | ({"reference": reference[0], "change": change} if reference else {}),
                    ensure_ascii=False,
                )
            )
        else:
            for subject, material, (values, total) in zip(
                subjects, materials, measured, strict=True
            ):
                for line in (
                    subject.name,
                    *material.notes,
                    *console.validation_lines(subject.iteration, values, total),
                ):
                    console.say(line)
            if args.reference:
                console.say("against the reference (above 0%: worse than it)")
                for line in comparison_lines(measured[0][0], measured[1][0], change):
                    console.say(line)
    return 0


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "chatflow evaluate",
        "Measure loss, perplexity and bits per byte of a checkpoint on each domain's validation "
        "part and on the curriculum's validation sets, or on raw text. Settings come from "
        "RUN/config.yaml.",
        EPILOG,
        command="evaluate",
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="evaluate the documents of this file instead of the corpora: JSON lines or parquet "
        "with `text`, or .txt with one document per line; .gz and .zst too. May be repeated.",
    )
    parser.add_argument(
        "--document-start",
        choices=("bos", "eod"),
        help="token before each document of --text. Default: end of document; begin of sequence, "
        "where there is one, for a model that was only converted.",
    )
    parser.add_argument(
        "--reference",
        metavar="RUN",
        help="evaluate a second run, one of its checkpoints (RUN/iter_0000100) or a Hugging Face "
        "folder on the same text, and print the change in percent",
    )
    parser.add_argument(
        "--average-checkpoints",
        type=int,
        default=1,
        metavar="N",
        help="evaluate the mean of the weights of the last N checkpoints, up to --ckpt-step. "
        "Default: 1.",
    )
    add_use_ema(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    parser.check = _check
    return parser


def _check(args: argparse.Namespace) -> Iterator[str]:
    if args.document_start and not args.text:
        yield ("--document-start has no effect without raw text; drop it or give --text NAME=FILE")


def _find_reference(path: str, config: Config, launch: Launch) -> Any:
    """Return the model at `path`, with the processes and windows of `config`.

    `path` is ``RUN``, ``RUN/iter_0000100`` or a Hugging Face folder.
    """
    from megatron_chatflow.evaluation.eval_model import laid_out_as, split_reference

    folder, step = split_reference(path)
    source = find_source(str(folder))
    reference = settings_alone(source).replace(load=str(folder), ckpt_step=step)
    return source.subject(laid_out_as(reference, config), launch.world_size)
