"""``chatflow generate``: text from a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_chatflow.cli.common import install_engine
from megatron_chatflow.cli.model_source import add_use_ema, parse_with_source
from megatron_chatflow.config import CommandParser, Config, make_parser
from megatron_chatflow.config.arguments import (
    non_negative_float,
    non_negative_int,
    number,
    positive_int,
)
from megatron_chatflow.config.schema import PrecisionSettings
from megatron_chatflow.distributed.launch import read_launch
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.report import console
from megatron_chatflow.utils.logging import configure_logging

logger = logging.getLogger(__name__)

EPILOG = """examples:
  {call} --load runs/zh --prompt 'The file' --prompt '文件'
  {call} --load runs/zh --prompt '文件' --temperature 0.8 --top-k 50 --top-p 0.95 --seed 7
  {call} --load runs/zh --chat --prompt 'Translate into Chinese: Good morning.'
  {call} --load runs/zh --prompt-file prompts.jsonl --micro-batch-size 16 --json > answers.jsonl
  torchrun --nproc-per-node 2 -m megatron_chatflow generate --load runs/zh \\
      --tensor-model-parallel-size 2 --prompt '文件'

exit codes: 0 generated, 2 the settings or the prompts cannot be used
"""


def main(argv: Sequence[str]) -> int:
    """Continue each prompt and print it."""
    launch = read_launch()
    source, config, args = parse_with_source(parser(), argv, launch.world_size, _plain)
    configure_logging(rank=launch.rank, stream="stderr")
    from megatron_chatflow.training.data_setup import open_tokenizer

    subject = source.subject(config, launch.world_size, use_ema=args.use_ema)
    model_size = (
        config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    )
    if launch.world_size != model_size:
        raise ConfigError(
            f"{launch.world_size} processes are more than tensor_model_parallel_size x "
            f"pipeline_model_parallel_size {model_size}, and generate "
            f"makes no copies of the model; start {model_size}, or raise one of the two"
        )
    tokenizer, vocab_size = open_tokenizer(config)
    prompts = _prompts(args, config, tokenizer, subject.config.model.max_position_embeddings)
    install_engine()
    from megatron_chatflow.evaluation.generate import generate
    from megatron_chatflow.evaluation.model_session import open_model, open_process_groups
    from megatron_chatflow.evaluation.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, config.training.seed)
    size = config.training.micro_batch_size
    with open_process_groups(subject.config, launch) as device:
        session = open_model(subject, vocab_size, device)
        began, tokens, unfinished = time.perf_counter(), 0, 0
        for at in range(0, len(prompts), size):
            batch = prompts[at : at + size]
            for prompt, more in zip(
                batch,
                generate(session, tokenizer, batch, args.max_new_tokens, sampling, at),
                strict=True,
            ):
                tokens += len(more.ids)
                unfinished += not more.ended and len(more.ids) < args.max_new_tokens
                if launch.rank == 0:
                    console.say(_shown(args, prompt, more, tokenizer))
        seconds = time.perf_counter() - began
    if unfinished:
        logger.info(
            f"{unfinished} cut off at max_position_embeddings "
            f"{subject.config.model.max_position_embeddings}"
        )
    logger.info(
        f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}, {tokens} new tokens in "
        f"{seconds:.1f} s ({tokens / seconds:.1f} a second)"
    )
    return 0


def _plain(config: Config) -> Config:
    """Return the settings without what needs rows of certain lengths: prompts have any length."""
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, sequence_parallel=False),
        precision=PrecisionSettings(),
    )


def _shown(args: argparse.Namespace, prompt: Any, more: Any, tokenizer: Any) -> str:
    """Return a prompt's line of output: the text with its continuation, or a chat's answer."""
    new = tokenizer.decode(more.ids)
    if prompt.end_text and more.ended:
        new = new.partition(prompt.end_text)[0]
    if args.json:
        found = {"text": new, "tokens": len(more.ids), "ended": more.ended}
        return json.dumps({**prompt.record, "continuation": found}, ensure_ascii=False)
    return new if args.chat is not None else tokenizer.decode(prompt.ids + more.ids)


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


def _prompts(args: argparse.Namespace, config: Config, tokenizer: Any, longest: int) -> list[Any]:
    """Return the prompts of the command line, then of the file.

    Raises:
        ConfigError: one of them cannot be used.
    """
    from megatron_chatflow.data.chat.prompts import chat_prompt, read_prompts, text_prompt
    from megatron_chatflow.data.chat.templates import MalformedRecord
    from megatron_chatflow.evaluation.eval_data import start_token

    template = None if args.chat is None else _template(args.chat, config, tokenizer)
    start = start_token(tokenizer, args.document_start)[0] if args.document_start else None
    records = [(f"prompt {text!r}", {"prompt": text}) for text in args.prompt or []]
    records += read_prompts(args.prompt_file) if args.prompt_file else []
    prompts = []
    for where, record in records:
        try:
            prompt = (
                chat_prompt(record, template, tokenizer)
                if template
                else text_prompt(record, tokenizer, start)
            )
        except MalformedRecord as error:
            raise ConfigError(f"{where}: {error}; correct it or remove it") from None
        if len(prompt.ids) >= longest:
            raise ConfigError(
                (
                    f"{where}: it has {len(prompt.ids)} tokens, and the model takes "
                    f"{longest} with the answer; shorten it"
                )
                + (
                    ", or raise --max-position-embeddings"
                    if config.model.position_embedding_type != "learned_absolute"
                    else ""
                )
            )
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"prompt_file {args.prompt_file} holds no prompt; write one per line")
    return prompts


def _template(name: str, config: Config, tokenizer: Any) -> str:
    """Return the chat template of that name; of an empty name, that of the instruction corpora."""
    from megatron_chatflow.data.chat.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE

    if not name:
        name = _trained_template(config)
    if name not in CHAT_TEMPLATES:
        raise ConfigError(
            f"chat: {name!r} is not a template; write one of {', '.join(CHAT_TEMPLATES)}"
        )
    if name == TOKENIZER_TEMPLATE:
        from megatron_chatflow.data.chat.jinja_template import check_tokenizer_template

        check_tokenizer_template(tokenizer)
    return name


def _trained_template(config: Config) -> str:
    """Return the chat template that the manifests of the run's instruction corpora name."""
    from megatron_chatflow.curriculum import load_curriculum
    from megatron_chatflow.data import read_manifest

    curriculum = config.data.curriculum and load_curriculum(config.data.curriculum)
    corpora = (
        [domain.path for domain in curriculum.domains.values() if domain.kind == "instruct"]
        if curriculum
        else []
    )
    manifests = [manifest for manifest in map(read_manifest, corpora) if manifest is not None]
    names = sorted(
        {
            source.get("template")
            for manifest in manifests
            for source in manifest.sources
            if source.get("template")
        }
    )
    if len(names) != 1:
        found = (
            f"are of several templates, {', '.join(names)}"
            if names
            else "do not name their template"
        )
        raise ConfigError(
            f"chat: the run's instruction corpora {found}; write --chat NAME, e.g. --chat chatflow"
        )
    return names[0]


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
