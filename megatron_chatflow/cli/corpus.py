"""``chatflow corpus merge`` and ``chatflow corpus verify``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

from megatron_chatflow.cli.run_command import note, run_command
from megatron_chatflow.config import CommandParser
from megatron_chatflow.config.arguments import positive_int
from megatron_chatflow.config.schema import TokenizerType
from megatron_chatflow.errors import ChatflowError, ConfigError

MERGE_EPILOG = """examples:
  {call} --input parts --output-prefix data/zh_text_document

exit codes: 0 written; nothing is written at 1 (a disk failed), 2 (the corpora or the flags cannot
be used) and 130 (interrupted)
"""
VERIFY_EPILOG = """examples:
  {call} data/zh_text_document data/en_text_document
  {call} data/zh_text_document --vocab-size 32000

exit codes: 0 every corpus is valid, 1 one is not, 2 the flags cannot be used or a corpus does not
exist
"""


def merge_parser(prog: str = "chatflow corpus merge") -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog,
        "Merge all corpora of a folder, in the order of their names. Their manifests are merged "
        "too, and must name one tokenizer.",
        MERGE_EPILOG,
    )
    parser.add_argument(
        "--input", required=True, metavar="DIR", help="folder with .bin and .idx of each corpus"
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="files are PREFIX.bin, .idx and .json",
    )
    parser.add_argument(
        "--multimodal",
        action="store_true",
        help="refuse text; conversations are recognized by their .idx without this flag",
    )
    return parser


def merge_main(argv: Sequence[str] | None = None, prog: str = "chatflow corpus merge") -> int:
    """Merge the corpora of a folder; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(prog, lambda: _merge(merge_parser(prog).parse(words)))


def _merge(arguments: argparse.Namespace) -> int:
    from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
    from megatron_chatflow.data.corpus.merge import find_corpora, merge
    from megatron_chatflow.utils.files import disk_errors

    with disk_errors(arguments.output_prefix):
        prefixes = find_corpora(arguments.input)
        for prefix in prefixes if arguments.multimodal else ():
            if not IndexedDataset(prefix).header.multimodal:
                raise ConfigError(
                    f"--multimodal is given, but {prefix} is text without sequence modes: "
                    f"drop the flag"
                )
        merged, manifest = merge(
            prefixes,
            arguments.output_prefix,
            note,
        )
    files = (
        ".bin, .idx and .json"
        if manifest
        else ".bin and .idx (no manifest, as none of the parts has one)"
    )
    print(
        f"{merged.prefix}{files}: {len(prefixes)} corpora, {merged.num_documents:,} "
        f"documents, {merged.num_tokens:,} tokens"
    )
    return 0


def verify_parser(prog: str = "chatflow corpus verify") -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog,
        "Read corpora completely and report what is wrong with them: lengths, pointers, documents, "
        "modes, tokens outside the vocabulary, and manifests and checksums that do not match.",
        VERIFY_EPILOG,
    )
    parser.usage = f"{parser.call} PREFIX [PREFIX ...] [flags]"
    parser.add_argument(
        "prefix", nargs="*", metavar="PREFIX", help="a corpus, without .bin and .idx"
    )
    given = parser.add_argument_group(
        "vocabulary", "what token ids are compared with; the manifest's by default"
    )
    given.add_argument(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help="tokens of the vocabulary, before padding",
    )
    given.add_argument(
        "--tokenizer-type",
        metavar="TYPE",
        help=f"take the size from a tokenizer: {', '.join(get_args(TokenizerType))}",
    )
    given.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="SentencePiece model, tokenizer.json or its folder, or tiktoken JSON",
    )
    given.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT2BPETokenizer")
    given.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    parser.check = _check
    return parser


def _check(arguments: argparse.Namespace) -> Iterator[str]:
    if not arguments.prefix:
        yield "PREFIX is missing; give the corpora to verify, without .bin and .idx"
    for prefix in arguments.prefix:
        if not any(os.path.exists(prefix + suffix) for suffix in (".bin", ".idx")):
            action = (
                f"write {prefix[:-4]}" if prefix.endswith((".bin", ".idx")) else "correct the path"
            )
            yield f"{prefix}.bin and {prefix}.idx do not exist: {action}"
    files = (arguments.tokenizer_model, arguments.vocab_file, arguments.merge_file)
    if arguments.tokenizer_type is None and any(files):
        yield "--tokenizer-type is missing: give it, or --vocab-size alone"


def verify_main(argv: Sequence[str] | None = None, prog: str = "chatflow corpus verify") -> int:
    """Verify corpora; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(prog, lambda: _verify(verify_parser(prog).parse(words)))


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
    from megatron_chatflow.data.corpus.verify import verify

    vocab_size, all_valid = _vocab_size(arguments), True
    for prefix in arguments.prefix:
        try:
            problems = verify(prefix, _progress(prefix), vocab_size)
        except ChatflowError as error:
            problems = [str(error)]
        for problem in problems:
            print(problem)
        if not problems:
            dataset = IndexedDataset(prefix)
            print(
                f"corpus {prefix}: valid, {dataset.num_documents:,} documents, "
                f"{dataset.num_tokens:,} tokens"
            )
        all_valid = all_valid and not problems
    return 0 if all_valid else 1


def _vocab_size(arguments: argparse.Namespace) -> int | None:
    """Return the size of the vocabulary that the flags name, or None."""
    if arguments.tokenizer_type is None:
        return arguments.vocab_size
    from megatron_chatflow.tokenizer import load_tokenizer

    return load_tokenizer(
        arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
        vocab_size=arguments.vocab_size,
    ).vocab_size


def _progress(prefix: str) -> Callable[[int, int], None]:
    """Return a function that prints how much of a corpus is read, at most once per second."""
    start = last = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= 1:
            last = now
            rate = done / (now - start)
            left = (total - done) / rate
            print(
                (
                    f"{prefix}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:.0f} "
                    f"MB/s, {left:.0f} s left"
                ),
                file=sys.stderr,
                flush=True,
            )

    return show
