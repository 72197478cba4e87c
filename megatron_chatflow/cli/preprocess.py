"""``chatflow preprocess``: text to Megatron's .bin/.idx."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

from megatron_chatflow.cli.progress_bar import ProgressBar
from megatron_chatflow.cli.run_command import note, run_command
from megatron_chatflow.config import CommandParser
from megatron_chatflow.config.schema import TokenizerType
from megatron_chatflow.report.console import lossy_output
from megatron_chatflow.utils.files import WriteError, disk_errors
from megatron_chatflow.utils.logging import configure_logging

if TYPE_CHECKING:
    from megatron_chatflow.data.preprocess.options import PreprocessOptions
    from megatron_chatflow.data.preprocess.summary import PreprocessSummary

EPILOG = """examples:
  # a language, on two processes: data/zh_text_document.{bin,idx,json}
  {call} --input zh.jsonl.gz --output-prefix data/zh --append-eod --workers 2 \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model spm.model
  # many files, with the tokenizer of a Hugging Face folder
  {call} --input 'crawl/*.jsonl.gz' --output-prefix data/en --append-eod \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model SmolLM2-135M
  # parallel text, {"en": ..., "zh": ...}: data/enzh_text_document.{bin,idx,json}
  {call} --input pairs.jsonl --kind parallel --template '{en}\\n{zh}' \\
      --output-prefix data/enzh ...
  # conversations, {"messages": [...]} or {"instruction", "input", "output"}:
  # data/instruct_document.{bin,idx,json}
  {call} --input chat.jsonl --kind instruct --output-prefix data/instruct ...
  # standard input
  xz -dc big.jsonl.xz | {call} --input - --output-prefix data/big ...
  # in random order; after a kill, the same command resumes, and the output is identical
  {call} --input 'crawl/*.parquet' --shuffle --resume --output-prefix data/en ...

exit codes: 0 written; nothing is written at 1 (malformed input, a worker died, a disk is full), 2
(a flag or a file cannot be used) and 129, 130 and 143 (SIGHUP, SIGINT (Ctrl-C), SIGTERM)
"""

_ORDER = "documents always keep the order of the input; drop the flag"
_TUNING = (
    "the pipeline keeps every process busy; drop the flag and give --workers the number of cores"
)
_PADDING = "the vocabulary is padded when the model is built; drop the flag"
_REFUSED = {
    "--partitions": "one run uses all --workers on all files, packed ones too; drop the flag",
    "--keep-sequential-samples": _ORDER,
    "--find-optimal-num-workers": _TUNING,
    "--workers-to-check": _TUNING,
    "--max-documents": _TUNING,
    "--use-gigatoken": "the tokenizer's own library is used; drop the flag",
    "--dataset-impl": "there is one format, Megatron's .bin/.idx; drop the flag",
    "--make-vocab-size-divisible-by": _PADDING,
    "--tensor-model-parallel-size": _PADDING,
    "--vocab-extra-ids": "extend the tokenizer itself; drop the flag",
    "--tiktoken-pattern": (
        "a list of tokens is split by Megatron's pattern v2, a tekken.json by its own; drop the "
        "flag"
    ),
    "--tiktoken-num-special-tokens": (
        "a list of tokens has 1000 special ones, a tekken.json names its own; drop the flag"
    ),
    "--tokenizer-special-tokens": "the tokenizer's files name the special tokens; drop the flag",
    "--trust-remote-code": "tokenizers are read from files and never run code; drop the flag",
    "--rank": "it had no meaning in Megatron either; drop the flag",
}


_IGNORED_SHOWN = 20
KINDS = ("text", "parallel", "instruct")
FORMATS = ("jsonl", "text", "parquet")
"""As in `data.preprocess`, which cannot be imported without numpy; a test compares them."""
DEFAULTS = {"max_document_bytes": 1 << 28, "max_malformed": 0.05, "seed": 1234}
"""Shown by `--help`; as in `data.preprocess` too."""


def parser(prog: str = "chatflow preprocess") -> CommandParser:
    """Return the parser of the command line: Megatron's flags, and those of `PreprocessOptions`."""
    parser = CommandParser(
        prog, "Convert text to Megatron's .bin/.idx, with a manifest next to it.", EPILOG
    )
    parser.unsupported = _REFUSED
    _add_input_flags(parser)
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer-type", required=True, metavar="TYPE", help=", ".join(get_args(TokenizerType))
    )
    tokenizer.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="SentencePiece model, tokenizer.json or its folder, or tiktoken JSON",
    )
    tokenizer.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument(
        "--vocab-size", type=int, metavar="N", help="of NullTokenizer and TikTokenizer"
    )
    tokenizer.add_argument(
        "--append-eod",
        action="store_true",
        help="end documents with the end-of-document token; chatflow and alpaca always do",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="files are PREFIX_<key>_document.bin, .idx and .json",
    )
    output.add_argument(
        "--shuffle", action="store_true", help="write the documents in random order"
    )
    output.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"seed of --shuffle. Default: {DEFAULTS['seed']}.",
    )
    output.add_argument(
        "--resume",
        action="store_true",
        help="continue where a run with the same settings and inputs was killed",
    )
    output.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that encode. Default: one per core.",
    )
    output.add_argument(
        "--log-interval",
        type=int,
        default=1000,
        metavar="N",
        help="documents between two progress reports, at most one per second. Default: 1000.",
    )
    return parser


def _add_input_flags(parser: CommandParser) -> None:
    data = parser.add_argument_group("input")
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, patterns in quotes, - for standard input; .gz and .zst are unpacked",
    )
    data.add_argument(
        "--input-format",
        choices=FORMATS,
        help="JSON lines or one JSON array, one document per line, or a table. Default: .txt is "
        "text, .parquet is a table, all else is jsonl.",
    )
    data.add_argument(
        "--kind",
        choices=KINDS,
        default="text",
        help="text under --json-keys, parallel text, or conversations. Default: text.",
    )
    data.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of --kind text, each of which becomes a corpus. Default: text.",
    )
    data.add_argument(
        "--template",
        help="of --kind parallel: e.g. '{en}\\n{zh}'. Of --kind instruct: chatflow (the default), "
        "alpaca, chatml, or tokenizer for the tokenizer's own.",
    )
    data.add_argument(
        "--skip-malformed",
        action="store_true",
        help="leave malformed records out and count them; they stop the run by default",
    )
    data.add_argument(
        "--max-malformed",
        type=float,
        metavar="FRACTION",
        help="with --skip-malformed: write nothing above this share of malformed records. "
        f"Default: {DEFAULTS['max_malformed']:g}.",
    )
    data.add_argument(
        "--max-document-bytes",
        type=int,
        default=DEFAULTS["max_document_bytes"],
        metavar="N",
        help="longest record in bytes, unpacked; a longer one is malformed. "
        f"Default: {DEFAULTS['max_document_bytes']}.",
    )
    data.add_argument(
        "--lang",
        help="language of the text, for the manifest and --split-sentences (there english by "
        "default)",
    )
    data.add_argument(
        "--split-sentences",
        action="store_true",
        help="make each sentence a sequence: by NLTK where its data is installed, else by a rule",
    )
    data.add_argument(
        "--keep-newlines",
        action="store_true",
        help="with --split-sentences: keep the white space after each sentence",
    )


def parse_arguments(argv: Sequence[str], prog: str = "chatflow preprocess") -> PreprocessOptions:
    """Return what the command line asks for.

    Raises:
        ConfigErrors: flags are unknown or missing, or have values that cannot be used.
    """
    values: dict[str, Any] = vars(parser(prog).parse(argv))
    from megatron_chatflow.data.preprocess.options import PreprocessOptions

    return PreprocessOptions(
        **{**values, "input": tuple(values["input"]), "json_keys": tuple(values["json_keys"])}
    )


def main(argv: Sequence[str] | None = None, prog: str = "chatflow preprocess") -> int:
    """Preprocess; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv

    def work() -> int:
        with lossy_output(), _interruptible():
            return _preprocess(words, prog)

    return run_command(prog, work)


def _preprocess(argv: Sequence[str], prog: str) -> int:
    settings: PreprocessOptions | None = None
    try:
        settings = parse_arguments(argv, prog)
        configure_logging(stream="stderr")
        from megatron_chatflow.data.preprocess.pipeline import preprocess
        from megatron_chatflow.data.preprocess.summary import MalformedInput
        from megatron_chatflow.data.preprocess.worker_pool import WorkerDied

        try:
            with ProgressBar(sys.stderr) as progress, disk_errors("the output"):
                summary = preprocess(settings, progress)
        except MalformedInput as error:
            return _fail(1, str(error))
        except (WriteError, WorkerDied) as error:
            return _fail(1, f"{error}; {_what_is_kept(settings)}")
        except MemoryError:
            advice = "try fewer --workers, or a smaller --max-document-bytes"
            return _fail(1, f"not enough memory: {advice}; {_what_is_kept(settings)}")
    except _Interrupted as interrupted:
        return _fail(128 + interrupted.number, f"interrupted; {_what_is_kept(settings)}")
    _conclude(settings, summary)
    return 0


class _Interrupted(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise at the first SIGINT, SIGTERM or SIGHUP, and end the process at the second.

    SIGINT and SIGHUP stay ignored where they are ignored: in the background, or under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = True

    def interrupt(number: int, _: object) -> None:
        nonlocal first
        if not first:
            os._exit(128 + number)
        first = False
        raise _Interrupted(number)

    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _what_is_kept(settings: PreprocessOptions | None) -> str:
    from megatron_chatflow.data.preprocess.resume_state import has_state

    if settings is None or not has_state(settings.unfinished()):
        return "nothing was written: run the command again"
    return (
        f"what is done is kept in {settings.unfinished()}: the same command with --resume "
        "continues from there"
    )


def _conclude(settings: PreprocessOptions, summary: PreprocessSummary) -> None:
    for line in summary.shown:
        note(f"left out: {line}")
    for prefix, manifest in summary.corpora.items():
        what = "conversations" if manifest.conversations else "documents"
        print(
            f"{prefix}.bin, .idx and .json: {manifest.documents:,} {what}, "
            f"{manifest.tokens:,} tokens, {manifest.bytes:,} bytes of text"
        )
    if summary.ignored:
        most = sorted(summary.ignored.items(), key=lambda item: (-item[1], item[0]))
        keys = ", ".join(
            f"{json.dumps(key, ensure_ascii=False)} ({count:,})"
            for key, count in most[:_IGNORED_SHOWN]
        )
        more = f" and {len(most) - _IGNORED_SHOWN:,} more" if len(most) > _IGNORED_SHOWN else ""
        print(f"keys that nothing reads, with the number of records: {keys}{more}")
    too_long = (
        f" ({summary.too_long:,} of them longer than --max-document-bytes)"
        if summary.too_long
        else ""
    )
    left_out = (
        f"; left out: {summary.malformed:,} malformed records{too_long}, {summary.empty:,} "
        f"empty documents"
    )
    skipped = left_out if summary.malformed or summary.empty else ""
    workers = f"{settings.workers} worker{'s' * (settings.workers > 1)}"
    print(
        f"{summary.seconds:.1f} s, {summary.bytes / 1e6 / summary.seconds:.2f} MB/s on "
        f"{workers}{skipped}"
    )


def _fail(code: int, message: str) -> int:
    for line in message.splitlines():
        note(line)
    return code
