"""The command line of `tools/preprocess_data.py`."""

import argparse
import difflib
import json
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from megatron_chatflow.cli.run_command import run_command
from megatron_chatflow.data.preprocess.encoder import KINDS
from megatron_chatflow.data.preprocess.input_files import FORMATS, MAX_DOCUMENT_BYTES
from megatron_chatflow.data.preprocess.options import (
    DEFAULT_MAX_MALFORMED,
    DEFAULT_SEED,
    PreprocessOptions,
)
from megatron_chatflow.data.preprocess.pipeline import preprocess
from megatron_chatflow.data.preprocess.resume_state import has_state
from megatron_chatflow.data.preprocess.summary import (
    MalformedInput,
    PreprocessProgress,
    PreprocessSummary,
)
from megatron_chatflow.data.preprocess.worker_pool import WorkerDied
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.report.console import lossy_output
from megatron_chatflow.tokenizer import TOKENIZER_TYPES
from megatron_chatflow.utils.files import WriteError, disk_errors

PROG = "preprocess_data.py"
_EXAMPLES = """
examples:
  # a language, on two processes
  python tools/preprocess_data.py --input zh.jsonl.gz --output-prefix data/zh --tokenizer-type SentencePieceTokenizer --tokenizer-model spm.model \\
      --append-eod --workers 2                                   -> data/zh_text_document.{bin,idx,json}
  # many files, from a folder of a Hugging Face model
  python tools/preprocess_data.py --input 'crawl/*.jsonl.gz' --output-prefix data/en --tokenizer-type HuggingFaceTokenizer \\
      --tokenizer-model SmolLM2-135M --append-eod --workers 8
  # parallel text: {"en": ..., "zh": ...}
  python tools/preprocess_data.py --input pairs.jsonl --kind parallel --template '{en}\\n{zh}' --output-prefix data/enzh ...
                                                                 -> data/enzh_text_document.{bin,idx,json}
  # conversations: {"messages": [...]}, {"conversations": [...]}, {"instruction", "input", "output"} or {"prompt", "completion"}
  python tools/preprocess_data.py --input chat.jsonl --kind instruct --output-prefix data/instruct ...
                                                                 -> data/instruct_document.{bin,idx,json}
  # standard input
  xz -dc big.jsonl.xz | python tools/preprocess_data.py --input - --output-prefix data/big ...
  # in a random order; and after a kill the same again with --resume: the output is byte for byte that of a run that was left alone
  python tools/preprocess_data.py --input 'crawl/*.parquet' --json-keys text --shuffle --resume --output-prefix data/en ...
  # a sequence a sentence                                        -> data/zh_text_sentence.{bin,idx,json}
  python tools/preprocess_data.py --input zh.jsonl.zst --split-sentences --lang chinese --output-prefix data/zh ...

exit codes: 0 written, 1 nothing written because of what the input holds, a worker that died or a disk that is full, 2 a setting or a file is wrong,
130, 143 and 129 interrupted by SIGINT (Ctrl-C), SIGTERM or SIGHUP.
"""

_ORDER = "documents always keep the order of the input; drop the flag"
_TUNING = (
    "the pipeline keeps every process busy by itself; drop the flag and give --workers the "
    "number of cores"
)
_REFUSED = {
    "--partitions": "one run uses all --workers on all files, zipped ones included; drop the flag",
    "--keep-sequential-samples": _ORDER,
    "--find-optimal-num-workers": _TUNING,
    "--workers-to-check": _TUNING,
    "--max-documents": _TUNING,
    "--use-gigatoken": "the tokenizer's own library is used; drop the flag",
    "--dataset-impl": "there is one format, Megatron's .bin/.idx; drop the flag",
    "--make-vocab-size-divisible-by": "the vocabulary is padded when the model is built; drop the flag",
    "--tensor-model-parallel-size": "the vocabulary is padded when the model is built; drop the flag",
    "--vocab-extra-ids": "extend the tokenizer itself; drop the flag",
    "--tiktoken-pattern": (
        "a list of tokens is split by Megatron's pattern v2, a tekken.json by its own; drop the "
        "flag"
    ),
    "--tiktoken-num-special-tokens": "a list of tokens has 1000 special ones, a tekken.json says it; drop the flag",
    "--tokenizer-special-tokens": "the tokenizer's files say which tokens are special; drop the flag",
    "--trust-remote-code": "tokenizers are read from files and never run code; drop the flag",
    "--rank": "it had no meaning in Megatron either; drop the flag",
}


_BAR = 30
_IGNORED_SHOWN = 20


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(message)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = (
            isinstance(action.default, str | int)
            and action.default is not False
            and not action.required
        )
        return super()._get_help_string(action) if shown else action.help


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; the flags are Megatron's, and those of
    `PreprocessOptions`.
    """
    description = "Text to Megatron's .bin/.idx, with a manifest beside it."
    parser = _Parser(
        prog=PROG,
        description=description,
        epilog=_EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    data = parser.add_argument_group("input")
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, patterns in quotes, - for standard input; .gz, .zst unpacked",
    )
    formats = (
        "JSON lines or one JSON array, a document a line, or a table; by default .txt is text, "
        ".parquet a table"
    )
    data.add_argument("--input-format", choices=FORMATS, help=formats)
    data.add_argument(
        "--kind",
        choices=KINDS,
        default="text",
        help="text under --json-keys, parallel text, or conversations",
    )
    data.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys that become a corpus each (--kind text; default: text)",
    )
    templates = (
        "chatflow, alpaca, chatml, or tokenizer for the tokenizer's own (--kind instruct, by "
        "default chatflow)"
    )
    data.add_argument("--template", help=f"'{{en}}\\n{{zh}}' (--kind parallel); {templates}")
    data.add_argument(
        "--skip-malformed",
        action="store_true",
        help="leave malformed records out and count them; without it they stop the run",
    )
    share = (
        f"with --skip-malformed: the share of malformed records beyond which nothing is written "
        f"(default: {DEFAULT_MAX_MALFORMED:g})"
    )
    data.add_argument("--max-malformed", type=float, metavar="FRACTION", help=share)
    limit = (
        "bytes of the longest record, unpacked; a longer one is malformed, and is not read to "
        "its end without --skip-malformed"
    )
    data.add_argument(
        "--max-document-bytes", type=int, default=MAX_DOCUMENT_BYTES, metavar="N", help=limit
    )
    data.add_argument(
        "--lang",
        help=(
            "language of the text, noted in the manifest; of --split-sentences, by default english"
        ),
    )
    data.add_argument(
        "--split-sentences",
        action="store_true",
        help="make each sentence a sequence: by NLTK where its data is, else by a rule",
    )
    data.add_argument(
        "--keep-newlines",
        action="store_true",
        help="with --split-sentences: a sentence keeps the white space that follows it",
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer-type", required=True, metavar="TYPE", help=", ".join(TOKENIZER_TYPES)
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
        help="end documents with the end-of-document token (chatflow and alpaca do anyway)",
    )
    output = parser.add_argument_group("output and run")
    output.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="files are PREFIX_<key>_document.bin, .idx and .json",
    )
    output.add_argument(
        "--shuffle", action="store_true", help="write the documents in a random order"
    )
    output.add_argument(
        "--seed", type=int, metavar="N", help=f"of --shuffle, by default {DEFAULT_SEED}"
    )
    output.add_argument(
        "--resume",
        action="store_true",
        help="go on where an earlier run with the same settings and inputs was killed",
    )
    cores = len(os.sched_getaffinity(0))
    output.add_argument(
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help="processes that encode, by default one per core",
    )
    output.add_argument(
        "--log-interval",
        type=int,
        default=1000,
        metavar="N",
        help="documents between two reports of progress, at most one a second",
    )
    return parser


def parse_arguments(argv: Sequence[str]) -> PreprocessOptions:
    """Reads the command line.

    Raises:
        ValueError: a flag is unknown, refused, or has a wrong value; one sentence.
    """
    parser = make_parser()
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in _REFUSED:
            raise ConfigError(f"{flag} is not taken: {_REFUSED[flag]}")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0], flags, n=1)
        raise ConfigError(
            f"{unknown[0]} is unknown: "
            + (f"did you mean {nearest[0]}?" if nearest else "see --help")
        )
    values = vars(known)
    return PreprocessOptions(
        **values | {"input": tuple(values["input"]), "json_keys": tuple(values["json_keys"])}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code that the examples in `--help` list."""

    def work() -> int:
        with lossy_output(), _interruptible():
            return _main(sys.argv[1:] if argv is None else argv)

    return run_command(PROG, work)


def _main(argv: Sequence[str]) -> int:
    settings: PreprocessOptions | None = None
    try:
        settings = parse_arguments(argv)
        with _ProgressBar(sys.stderr) as progress, disk_errors("the output"):
            summary = preprocess(settings, progress, _note)
    except MalformedInput as error:
        return _refuse(1, str(error))
    except (WriteError, WorkerDied) as error:
        return _refuse(1, f"{error}; {_what_is_left(settings)}")
    except MemoryError:
        advice = "try fewer --workers, or a smaller --max-document-bytes"
        return _refuse(1, f"not enough memory: {advice}; {_what_is_left(settings)}")
    except _Interrupted as interrupted:
        return _refuse(128 + interrupted.number, f"interrupted; {_what_is_left(settings)}")
    _conclude(settings, summary)
    return 0


class _Interrupted(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP raises, and the second ends the process at once.

    SIGINT and SIGHUP stay ignored where they are: in the background, or under nohup.
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


def _what_is_left(settings: PreprocessOptions | None) -> str:
    if settings is None or not has_state(settings.unfinished()):
        return "nothing was written: start it again"
    return (
        f"what is done is kept in {settings.unfinished()}: the same command with --resume goes "
        f"on from there"
    )


class _ProgressBar:
    """Shows progress at most once a second: a bar that is drawn again and again on a terminal,
    lines anywhere else.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = False
        self._last = 0.0

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            print(file=self._stream)

    def __call__(self, progress: PreprocessProgress) -> None:
        if progress.seconds - self._last < 1:
            return
        self._last = progress.seconds
        if self._stream.isatty():
            self._drawn = True
            print(
                f"\r{_bar(progress)}{_line(progress)}\x1b[K", end="", file=self._stream, flush=True
            )
        else:
            print(_line(progress), file=self._stream, flush=True)


def _bar(progress: PreprocessProgress) -> str:
    return "" if progress.done is None else f"[{'#' * round(_BAR * progress.done):<{_BAR}}] "


def _line(progress: PreprocessProgress) -> str:
    line = (
        f"{progress.documents:,} documents, {progress.bytes / 1e6:,.1f} MB of text, "
        f"{progress.rate / 1e6:.2f} MB/s"
    )
    if progress.done is not None:
        line += f", {progress.done:.0%} of the input"
    if progress.left is not None:
        left = round(progress.left)
        line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    return line


def _note(sentence: str) -> None:
    print(f"{PROG}: {sentence}", file=sys.stderr, flush=True)


def _conclude(settings: PreprocessOptions, summary: PreprocessSummary) -> None:
    for line in summary.shown:
        _note(f"left out: {line}")
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


def _refuse(code: int, message: str) -> int:
    print(textwrap.indent(message, f"{PROG}: "), file=sys.stderr)
    return code
