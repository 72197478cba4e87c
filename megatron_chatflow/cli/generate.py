"""``chatflow generate``: text from a checkpoint."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_chatflow.cli.model_source import add_use_ema, parse_with_source
from megatron_chatflow.config import CommandParser, make_parser
from megatron_chatflow.config.arguments import (
    non_negative_float,
    non_negative_int,
    number,
    positive_int,
)
from megatron_chatflow.distributed.launch import read_launch
from megatron_chatflow.evaluation.eval_model import with_any_length
from megatron_chatflow.report import console
from megatron_chatflow.utils.logging import configure_logging

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megatron_chatflow.evaluation.generate import Generation

EPILOG = """examples:
  {call} --load runs/zh --prompt 'The file' --prompt '文件'
  {call} --load runs/zh --prompt '文件' --temperature 0.8 --top-k 50 --top-p 0.95 --seed 7
  {call} --load runs/zh --chat --prompt 'Translate into Chinese: Good morning.'
  {call} --load runs/zh --prompt-file prompts.jsonl --micro-batch-size 16 --json
  torchrun --nproc-per-node 2 -m megatron_chatflow generate --load runs/zh \\
      --tensor-model-parallel-size 2 --prompt '文件'

exit codes: 0 generated, 2 the settings or the prompts cannot be used
"""


def main(argv: Sequence[str]) -> int:
    """Continue each prompt and print it."""
    launch = read_launch()
    source, config, args = parse_with_source(parser(), argv, launch.world_size, with_any_length)
    from megatron_chatflow.evaluation.generate import open_generations

    configure_logging(rank=launch.rank, stream="stderr")
    count, tokens, cut_off, longest = 0, 0, 0, None
    with open_generations(
        source,
        config,
        args.prompt or (),
        prompt_file=args.prompt_file,
        chat=args.chat,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        document_start=args.document_start,
        use_ema=args.use_ema,
    ) as generations:
        began = time.perf_counter()
        for generation in generations:
            count, tokens = count + 1, tokens + generation.num_tokens
            if generation.cut_off_at is not None:
                cut_off, longest = cut_off + 1, generation.cut_off_at
            if launch.rank == 0:
                console.say(_record(generation) if args.json else generation.full_text)
        seconds = time.perf_counter() - began
    if cut_off:
        logger.info(f"{cut_off} cut off at max_position_embeddings {longest}")
    logger.info(
        f"{count} prompt{'s' if count > 1 else ''}, {tokens} new tokens in "
        f"{seconds:.1f} s ({tokens / seconds:.1f} a second)"
    )
    return 0


def _record(generation: Generation) -> str:
    """Return the JSON line of a prompt with its continuation."""
    continuation = {
        "text": generation.text,
        "tokens": generation.num_tokens,
        "ended": generation.ended,
    }
    return json.dumps({**generation.prompt, "continuation": continuation}, ensure_ascii=False)


def _check(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each value that cannot be used."""
    if not (args.prompt or args.prompt_file):
        yield "--prompt is missing; give --prompt TEXT or --prompt-file FILE"
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        yield (
            "--top-k and --top-p have no effect on greedy generation; add --temperature, e.g. "
            "--temperature 1, or drop them"
        )
    if args.chat is not None and args.document_start:
        yield (
            "--document-start has no effect with a chat template, which defines how a "
            "conversation begins; drop --document-start or --chat"
        )


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "chatflow generate",
        "Continue prompts with a checkpoint, greedily or by sampling. Settings come from "
        "RUN/config.yaml.",
        EPILOG,
        command="generate",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="JSON lines with `prompt` (with --chat also `messages`, or `instruction` and "
        "`input`), or .txt with one prompt per line",
    )
    parser.add_argument(
        "--chat",
        nargs="?",
        const="",
        metavar="TEMPLATE",
        help="render prompts as conversations and print the answers alone: chatflow, alpaca, "
        "chatml, or tokenizer for the tokenizer's own template; without a name, the template of "
        "the run's instruction corpora",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=64,
        metavar="N",
        help="largest number of tokens to add. Default: 64.",
    )
    parser.add_argument(
        "--temperature",
        type=non_negative_float,
        default=0.0,
        metavar="X",
        help="0 takes the most likely token (greedy); above 0, sample. Default: 0.",
    )
    parser.add_argument(
        "--top-k",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="sample among the N most likely tokens; 0 means all. Default: 0.",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, lambda x: 0 < x <= 1, "a number above 0 and up to 1"),
        default=1.0,
        metavar="X",
        help="sample among the fewest most likely tokens with this total probability. Default: 1.",
    )
    parser.add_argument(
        "--document-start",
        choices=("bos", "eod"),
        help="put the begin-of-sequence or the end-of-document token before each prompt. "
        "Default: none.",
    )
    add_use_ema(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per prompt: the record, and the continuation",
    )
    parser.check = _check
    return parser
