"""The work of `chatflow tokenizer extend`: read text, extend or replace, measure and report."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_chatflow.cli.run_command import note
from megatron_chatflow.config import pad_vocab_size
from megatron_chatflow.data.preprocess.records import read_texts
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.report.fertility_table import fertility_table
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.extend import (
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

_BATCH = 1 << 20
"""Characters of one batch of documents."""
_HELD_OUT_EVERY = 20
_HELD_OUT_BYTES = 8_000_000


def extend_tokenizer(settings: argparse.Namespace) -> None:
    """Write the new tokenizer, its token map and the report; print the comparison."""
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
    note(f"{before.name}: {base.size:,} tokens; reading {', '.join(settings.input)}")
    progress = _Progress(settings.new_tokens)
    if settings.replace:
        outcome = replace(base, corpus, base_corpus, settings.new_tokens, progress)
    else:
        outcome = extend(base, corpus, settings.new_tokens, settings.characters, progress)
    os.makedirs(settings.output, exist_ok=True)
    files = outcome.vocabulary.save(settings.output, file)
    if "tokenizer.json" not in files:
        note(
            "no tokenizer.json is written, because the model normalizes text; transformers makes "
            "one from tokenizer.model"
        )
    written = (
        os.path.join(settings.output, "tokenizer.model")
        if settings.tokenizer_type in SENTENCEPIECE
        else settings.output
    )
    after = load_tokenizer(settings.tokenizer_type, tokenizer_model=written)
    note(f"measuring on {', '.join(measured)}")
    languages = {name: compare(before, after, texts) for name, texts in measured.items()}
    report = _report(settings, base, before, after, outcome, languages)
    if outcome.joined:
        tokens = {name: len(outcome.before.encode(texts)[0]) for name, texts in measured.items()}
        report["marks_joined"] = {"scripts": outcome.joined, "tokens_without_new_ones": tokens}
    write_json(os.path.join(settings.output, "report.json"), report)
    kind = "replace" if settings.replace else "extend"
    write_json(
        os.path.join(settings.output, TOKEN_MAP),
        make_token_map(kind, base, outcome.vocabulary.size, outcome.new),
    )
    print(
        "\n".join(
            fertility_table({name: language.to_json() for name, language in languages.items()})
        )
    )
    print("\n".join(_conclusion(settings, report)))
    print(
        f"{settings.output}: {', '.join([*files, 'report.json', TOKEN_MAP])}; "
        f"{time.perf_counter() - start:.0f} s"
    )


def _corpus(settings: argparse.Namespace, paths: Sequence[str]) -> Texts:
    """Return the documents to learn from, in batches."""

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
    """Return whether a document is held out to measure on: one in 20, by the hash of its text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _HELD_OUT_EVERY == 0


def _held_out_texts(settings: argparse.Namespace) -> dict[str, list[str]]:
    """Return the documents to measure on by name, the first 8 MB of each."""
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
    """Reports how many tokens are learned, at most every two seconds."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._last = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self._last >= 2:
            self._last = now
            note(f"{done:,} of {self._wanted:,} tokens learned")
