"""``tools/extend_tokenizer.py``: a tokenizer for a new language out of the one that a model has."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint.lease import Lease
from megatron_chatflow.cli.run_command import run_command
from megatron_chatflow.config import pad_vocab_size
from megatron_chatflow.data.preprocess.input_files import STDIN, open_sources
from megatron_chatflow.data.preprocess.records import read_texts
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.report.fertility_table import fertility_table
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.extend import (
    EXTENDABLE,
    SENTENCEPIECE,
    ExtensionResult,
    Texts,
    extend,
    open_vocabulary,
    replace,
)
from megatron_chatflow.tokenizer.fertility import TokenizerComparison, compare
from megatron_chatflow.tokenizer.token_map import TOKEN_MAP, make_token_map
from megatron_chatflow.tokenizer.vocabulary_base import Vocabulary, write_json
from megatron_chatflow.utils.files import disk_errors
from megatron_chatflow.utils.user_files import check_name

PROG = "extend_tokenizer.py"
_EXAMPLES = """
examples:
  # 8,000 tokens more for Chinese, in the way of byte-pair encoding; English keeps its tokens
  python tools/extend_tokenizer.py --tokenizer-type SentencePieceTokenizer --tokenizer-model mistral/tokenizer.model --input zh.jsonl.gz \\
      --base-input en.jsonl.gz --new-tokens 8000 --output mistral-zh
  # the same for the tokenizer.json of a Hugging Face folder
  python tools/extend_tokenizer.py --tokenizer-type HuggingFaceTokenizer --tokenizer-model SmolLM2-135M --input 'zh/*.jsonl' --new-tokens 8000 \\
      --output smollm2-zh
  # single characters only, the most frequent first
  python tools/extend_tokenizer.py ... --input zh.jsonl.gz --characters --new-tokens 8076 --output llama-zh
  # the size unchanged: 6,000 Hungarian tokens in the place of the least used ones; needs text of the language to keep
  python tools/extend_tokenizer.py ... --input hu.jsonl.gz --base-input en.jsonl.gz --replace --new-tokens 6000 --output mistral-hu

The output folder holds the tokenizer, token_map.json (what each new token was made of, for convert_checkpoint.py) and report.json.
exit codes: 0 written, 1 a disk failed, 2 a setting or a file is wrong and nothing was written, 130 interrupted.
"""
_BATCH = 1 << 20
_HELD_OUT_EVERY = 20
_HELD_OUT_BYTES = 8_000_000
_OWN = TOKEN_MAP


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(message)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    description = (
        "Extends a model's tokenizer for a new language, or replaces its least used tokens, and "
        "tells how well the result fits."
    )
    parser = _Parser(
        PROG,
        description=description,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        help="keys of a record that hold text (default: text)",
    )
    text.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help=(
            "files to measure on, each under a name; by default one document in 20 of --input "
            "and of --base-input, which is then not learned from"
        ),
    )
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "--new-tokens",
        type=int,
        required=True,
        metavar="N",
        help="how many tokens to add or to replace",
    )
    what.add_argument(
        "--replace",
        action="store_true",
        help="put the new tokens in the place of the least used ones; the size stays",
    )
    what.add_argument(
        "--characters",
        action="store_true",
        help="add single characters only, the most frequent first",
    )
    what.add_argument("--output", required=True, metavar="DIR", help="folder for the new tokenizer")
    what.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="to tell the size that the vocabulary is padded to (default: 1)",
    )
    what.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="for the same (default: 128)",
    )
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line, and checks all of it that can be checked without reading text.

    Raises:
        ValueError: a flag is unknown or has a wrong value; one sentence.
    """
    parser = make_parser()
    settings, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0], flags, n=1)
        raise ConfigError(
            f"{unknown[0]} is unknown: "
            + (f"did you mean {nearest[0]}?" if nearest else "see --help")
        )
    for name in ("new_tokens", "tensor_model_parallel_size", "make_vocab_size_divisible_by"):
        if getattr(settings, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(settings, name)} is too few: give at least 1"
            )
    if settings.replace and not settings.base_input:
        raise ConfigError(
            "--replace needs --base-input: text of the language whose tokens are to be kept"
        )
    if settings.replace and settings.characters:
        raise ConfigError("--characters has no meaning with --replace: drop one of them")
    for item in settings.held_out:
        if not all(item.partition("=")):
            raise ConfigError(
                f"--held-out {item} has no name: write it as NAME=FILE, such as "
                f"en=held_out_en.jsonl"
            )
        check_name("--held-out", item.partition("=")[0])
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
        and not os.path.exists(os.path.join(settings.output, _OWN))
    ):
        raise ConfigError(
            f"--output {settings.output} holds other files: name a new folder, or one that "
            f"this tool has written"
        )
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code that `--help` tells."""
    return run_command(PROG, lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    settings = parse_arguments(argv)
    with disk_errors("the output"), Lease.beside(Path(settings.output), "output") as lease:
        lease.acquire(_say)
        _run(settings)
    return 0


def _run(settings: argparse.Namespace) -> None:
    start = time.perf_counter()
    before = load_tokenizer(settings.tokenizer_type, tokenizer_model=settings.tokenizer_model)
    file = (
        os.path.join(settings.tokenizer_model, "tokenizer.json")
        if os.path.isdir(settings.tokenizer_model)
        else settings.tokenizer_model
    )
    base = open_vocabulary(settings.tokenizer_type, file)
    measured = _held_out_texts(settings)
    corpus, base_corpus = _corpus(settings, settings.input), _corpus(settings, settings.base_input)
    _say(f"{before.name}: {base.size:,} tokens; reading {', '.join(settings.input)}")
    progress = _Progress(settings.new_tokens)
    if settings.replace:
        outcome = replace(base, corpus, base_corpus, settings.new_tokens, progress)
    else:
        outcome = extend(base, corpus, settings.new_tokens, settings.characters, progress)
    os.makedirs(settings.output, exist_ok=True)
    files = outcome.vocabulary.save(settings.output, file)
    if "tokenizer.json" not in files:
        _say(
            "no tokenizer.json is written, because the model normalises text; transformers "
            "makes one by itself from tokenizer.model"
        )
    written = (
        os.path.join(settings.output, "tokenizer.model")
        if settings.tokenizer_type in SENTENCEPIECE
        else settings.output
    )
    after = load_tokenizer(settings.tokenizer_type, tokenizer_model=written)
    _say(f"measuring on {', '.join(measured)}")
    languages = {name: compare(before, after, texts) for name, texts in measured.items()}
    report = _report(settings, base, before, after, outcome, languages)
    if outcome.joined:
        tokens = {name: len(outcome.before.encode(texts)[0]) for name, texts in measured.items()}
        report["marks_joined"] = {"scripts": outcome.joined, "tokens_without_new_ones": tokens}
    write_json(os.path.join(settings.output, "report.json"), report)
    kind = "replace" if settings.replace else "extend"
    write_json(
        os.path.join(settings.output, _OWN),
        make_token_map(kind, base, outcome.vocabulary.size, outcome.new),
    )
    print(
        "\n".join(
            fertility_table({name: language.to_json() for name, language in languages.items()})
        )
    )
    print("\n".join(_conclusion(settings, report)))
    print(
        f"{settings.output}: {', '.join([*files, 'report.json', _OWN])}; "
        f"{time.perf_counter() - start:.0f} s"
    )


def _corpus(settings: argparse.Namespace, paths: Sequence[str]) -> Texts:
    """The documents to learn from, in batches."""

    def batches() -> Iterator[list[str]]:
        batch, size = [], 0
        for text in read_texts(paths, settings.json_keys):
            if settings.held_out or not is_held_out(text):
                batch.append(text)
                size += len(text)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    return batches


def is_held_out(text: str) -> bool:
    """Whether a document is one of those that are measured on: one in 20, by the hash of its
    text.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _HELD_OUT_EVERY == 0


def _held_out_texts(settings: argparse.Namespace) -> dict[str, list[str]]:
    """The documents to measure on by name, the first 8 MB of each."""
    if settings.held_out:
        found = {
            name: _first(read_texts([path], settings.json_keys))
            for name, path in settings.held_out.items()
        }
        flag = "--held-out {}={}"
    else:
        inputs = {"input": settings.input, "base-input": settings.base_input}
        found = {
            name: _first(filter(is_held_out, read_texts(paths, settings.json_keys)))
            for name, paths in inputs.items()
            if paths
        }
        flag = "--{} has too few documents to hold one in 20 out: give --held-out"
    for name, texts in found.items():
        if not texts:
            path = settings.held_out.get(name)
            raise ConfigError(
                flag.format(name, path) + " has no text: give another file" * bool(path)
            )
    return found


def _first(texts: Iterator[str]) -> list[str]:
    result, size = [], 0
    for text in texts:
        result.append(text)
        size += len(text.encode())
        if size >= _HELD_OUT_BYTES:
            break
    return result


def _report(
    settings: argparse.Namespace,
    base: Vocabulary,
    before: Tokenizer,
    after: Tokenizer,
    outcome: ExtensionResult,
    languages: dict[str, TokenizerComparison],
) -> dict[str, Any]:
    padded = pad_vocab_size(
        after.vocab_size, settings.make_vocab_size_divisible_by, settings.tensor_model_parallel_size
    )
    method = (
        "replaced"
        if settings.replace
        else "characters"
        if settings.characters
        else "continued merges"
    )
    old = base.removable()
    return {
        "version": 1,
        "method": method,
        "before": before.identity(),
        "after": after.identity(),
        "new_tokens": len(outcome.new),
        "removed": [
            {"id": i, "text": base.text[i].decode(errors="replace")} for i in outcome.removed
        ],
        "unreachable_new_tokens": len(
            outcome.vocabulary.unreachable([token.id for token in outcome.new])
        ),
        "unreachable_tokens_before": len(base.unreachable(old)),
        "unreachable_tokens_after": len(
            outcome.vocabulary.unreachable(outcome.vocabulary.removable())
        ),
        "new_tokens_are_of_another_script_than_latin": outcome.other_script,
        "padded_vocab_size": {
            "tensor_model_parallel_size": settings.tensor_model_parallel_size,
            "make_vocab_size_divisible_by": settings.make_vocab_size_divisible_by,
            "size": padded,
        },
        "languages": {name: language.to_json() for name, language in languages.items()},
    }


def _conclusion(settings: argparse.Namespace, report: dict[str, Any]) -> Iterator[str]:
    size, padded = report["after"]["vocab_size"], report["padded_vocab_size"]
    done = f"{report['new_tokens']:,} tokens " + ("replaced" if settings.replace else "added")
    yield (
        f"{done}: {size:,} tokens, padded to {padded['size']:,} for "
        f"--tensor-model-parallel-size {padded['tensor_model_parallel_size']}"
    )
    dead, dead_before = report["unreachable_tokens_after"], report["unreachable_tokens_before"]
    yield (
        f"unreachable: {report['unreachable_new_tokens']} new tokens; {dead:,} of all, "
        f"{dead_before:,} before"
    )
    if joined := report.get("marks_joined"):
        scripts = ", ".join(name.capitalize() for name in joined["scripts"])
        yield (
            f"combining marks of {scripts} count as letters now, in the pattern of "
            f"tokenizer.json; text with them may have other tokens:"
        )
        for name, tokens in joined["tokens_without_new_ones"].items():
            old = report["languages"][name]["before"]["tokens"]
            yield (
                f"  {name}: {old:,} tokens before, {tokens:,} with the old tokens and the new "
                f"pattern"
            )
    if report["new_tokens_are_of_another_script_than_latin"] and not settings.replace:
        yield (
            "text in Latin letters keeps its tokens: every new token has, or begins, a letter "
            "of another script or East Asian punctuation"
        )


class _Progress:
    """Says how many tokens are learned, at most every two seconds."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._last = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self._last >= 2:
            self._last = now
            _say(f"{done:,} of {self._wanted:,} tokens learned")


def _say(sentence: str) -> None:
    print(f"{PROG}: {sentence}", file=sys.stderr, flush=True)
