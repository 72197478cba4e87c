"""``chatflow tokenizer extend``: a tokenizer for a new language from a model's tokenizer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_chatflow.cli.run_command import run_command
from megatron_chatflow.config import CommandParser
from megatron_chatflow.config.arguments import positive_int
from megatron_chatflow.errors import ConfigError, ErrorCollector
from megatron_chatflow.utils.files import disk_errors
from megatron_chatflow.utils.logging import configure_logging
from megatron_chatflow.utils.user_files import check_name

EPILOG = """examples:
  # 8,000 more byte-pair tokens for Chinese; English keeps its tokens
  {call} --tokenizer-type SentencePieceTokenizer \\
      --tokenizer-model mistral/tokenizer.model --input zh.jsonl.gz --base-input en.jsonl.gz \\
      --new-tokens 8000 --output mistral-zh
  # the same for the tokenizer.json of a Hugging Face folder
  {call} --tokenizer-type HuggingFaceTokenizer --tokenizer-model SmolLM2-135M \\
      --input 'zh/*.jsonl' --new-tokens 8000 --output smollm2-zh
  # single characters only, the most frequent first
  {call} ... --input zh.jsonl.gz --characters --new-tokens 8076 --output llama-zh
  # the same size: 6,000 Hungarian tokens in place of the least used ones
  {call} ... --input hu.jsonl.gz --base-input en.jsonl.gz --replace \\
      --new-tokens 6000 --output mistral-hu

The output folder holds the tokenizer, report.json, and token_map.json: what each new token was made
of, for `chatflow convert`.

exit codes: 0 written, 1 a disk failed, 2 a flag or a file cannot be used and nothing was written,
130 interrupted
"""
EXTENDABLE = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
)
"""As in `tokenizer.extend`, which cannot be imported without numpy; a test compares them."""


def extend_parser(prog: str = "chatflow tokenizer extend") -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog,
        "Extend a model's tokenizer for a new language, or replace its least used tokens, and "
        "report how well the result fits.",
        EPILOG,
    )
    base = parser.add_argument_group("the tokenizer to start from")
    base.add_argument("--tokenizer-type", required=True, metavar="TYPE", help=", ".join(EXTENDABLE))
    base.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="FILE",
        help="the SentencePiece .model (BPE), or a byte-level tokenizer.json or its folder",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text of the new language: JSON lines, .txt, parquet; .gz, .zst; patterns",
    )
    text.add_argument(
        "--base-input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text of the language to keep: measured, and needed by --replace",
    )
    text.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of a record that hold text. Default: text.",
    )
    text.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="files to measure on, each with a name. Default: one document in 20 of --input and "
        "--base-input, which is then not learned from.",
    )
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "--new-tokens",
        type=positive_int,
        required=True,
        metavar="N",
        help="number of tokens to add or to replace",
    )
    what.add_argument(
        "--replace",
        action="store_true",
        help="put the new tokens in place of the least used ones, and keep the size",
    )
    what.add_argument(
        "--characters",
        action="store_true",
        help="add single characters only, the most frequent first",
    )
    what.add_argument("--output", required=True, metavar="DIR", help="folder for the new tokenizer")
    what.add_argument(
        "--tensor-model-parallel-size",
        type=positive_int,
        default=1,
        metavar="N",
        help="to report the size that the vocabulary is padded to. Default: 1.",
    )
    what.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive_int,
        default=128,
        metavar="N",
        help="to report the same. Default: 128.",
    )
    parser.check = _check
    return parser


def _check(settings: argparse.Namespace) -> Iterator[str]:
    if settings.replace and not settings.base_input:
        yield "--replace needs --base-input: text of the language whose tokens are to be kept"
    if settings.replace and settings.characters:
        yield "--characters has no meaning with --replace: drop one of them"
    for item in settings.held_out:
        if not all(item.partition("=")):
            yield (
                f"--held-out {item} has no name: write it as NAME=FILE, such as "
                "en=held_out_en.jsonl"
            )
            continue
        invalid = ErrorCollector()
        with invalid.collect():
            check_name("--held-out", item.partition("=")[0])
        yield from invalid.messages


def parse_arguments(
    argv: Sequence[str], prog: str = "chatflow tokenizer extend"
) -> argparse.Namespace:
    """Return what the command line asks for, checked as far as that needs no text.

    Raises:
        ConfigError: flags or files cannot be used.
    """
    settings = extend_parser(prog).parse(argv)
    from megatron_chatflow.data.preprocess.input_files import STDIN, open_sources
    from megatron_chatflow.tokenizer.token_map import TOKEN_MAP

    settings.held_out = dict(item.split("=", 1) for item in settings.held_out)
    for paths in (
        settings.input,
        settings.base_input,
        *([path] for path in settings.held_out.values()),
    ):
        if STDIN in paths:
            raise ConfigError(
                "the standard input is not taken, because text is read more than once: name a file"
            )
        for source in open_sources(paths):
            if source.size is None:
                raise ConfigError(
                    f"--input {source.path} is a pipe, and text is read more than once: name a file"
                )
    if os.path.exists(settings.output) and not os.path.isdir(settings.output):
        raise ConfigError(f"--output {settings.output} is a file: name a folder")
    if (
        os.path.isdir(settings.output)
        and os.listdir(settings.output)
        and not os.path.exists(os.path.join(settings.output, TOKEN_MAP))
    ):
        raise ConfigError(
            f"--output {settings.output} holds other files: name a new folder, or one that "
            f"this command has written"
        )
    return settings


def extend_main(argv: Sequence[str] | None = None, prog: str = "chatflow tokenizer extend") -> int:
    """Extend a tokenizer; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(prog, lambda: _extend(words, prog))


def _extend(argv: Sequence[str], prog: str) -> int:
    settings = parse_arguments(argv, prog)
    configure_logging(stream="stderr")
    from megatron_chatflow.checkpoint.lease import Lease
    from megatron_chatflow.cli.tokenizer_extension import extend_tokenizer

    with disk_errors("the output"), Lease.next_to(Path(settings.output), "output") as lease:
        lease.acquire()
        extend_tokenizer(settings)
    return 0
