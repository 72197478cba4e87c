"""``chatflow evaluate``: a checkpoint on held-out text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_chatflow.cli.model_source import add_use_ema, parse_with_source
from megatron_chatflow.config import CommandParser, make_parser
from megatron_chatflow.distributed.launch import read_launch
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.report import console
from megatron_chatflow.report.evaluation_table import comparison_lines
from megatron_chatflow.utils.logging import configure_logging

if TYPE_CHECKING:
    from megatron_chatflow.evaluation.evaluate import Evaluation

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
    """Print loss, perplexity and bits per byte of a checkpoint on held-out text."""
    launch = read_launch()
    source, config, args = parse_with_source(parser(), argv, launch.world_size)
    configure_logging(rank=launch.rank, stream="stderr")
    from megatron_chatflow.evaluation.evaluate import evaluate_source

    result = evaluate_source(
        source,
        config,
        texts=_named_texts(args.text),
        document_start=args.document_start,
        reference=args.reference,
        average_checkpoints=args.average_checkpoints,
        use_ema=args.use_ema,
    )
    if launch.rank == 0 and args.json:
        console.say(json.dumps(_record(result), ensure_ascii=False))
    elif launch.rank == 0:
        _print_tables(result)
    return 0


def _named_texts(words: Sequence[str]) -> dict[str, str]:
    """Return {name: file} of ``NAME=FILE`` words."""
    texts: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ConfigError(
                f"text {word!r} does not say what it is called; write --text NAME=FILE, "
                f"e.g. --text zh=held_out.jsonl"
            )
        if name in texts:
            raise ConfigError(f"text {name} is given twice; give each file a different name")
        texts[name] = path
    return texts


def _record(result: Evaluation) -> dict[str, Any]:
    record: dict[str, Any] = {
        "checkpoint": result.checkpoint,
        "iteration": result.iteration,
        "validation": result.validation,
        "notes": result.notes,
    }
    if result.reference is not None:
        record |= {"reference": _record(result.reference), "change": result.change}
    return record


def _print_tables(result: Evaluation) -> None:
    for model in (result, result.reference):
        if model is not None:
            rows = console.validation_lines(model.iteration, model.validation, model.total)
            for line in (model.checkpoint, *model.notes, *rows):
                console.say(line)
    if result.reference is not None:
        console.say("against the reference (above 0%: worse than it)")
        for line in comparison_lines(result.validation, result.reference.validation, result.change):
            console.say(line)


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
