"""The options of `preprocess`, and what follows from them."""

import os
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.data.chat.templates import (
    CHAT_TEMPLATES,
    DEFAULT_CHAT_TEMPLATE,
    TOKENIZER_TEMPLATE,
    ParallelTemplate,
)
from megatron_chatflow.data.corpus.index_header import best_dtype
from megatron_chatflow.data.preprocess.encoder import KINDS, EncodeTask
from megatron_chatflow.data.preprocess.input_files import FORMATS, MAX_DOCUMENT_BYTES, InputSource
from megatron_chatflow.data.preprocess.sentence_split import SentenceSplitting, choose_splitting
from megatron_chatflow.errors import DataError
from megatron_chatflow.tokenizer import Tokenizer
from megatron_chatflow.utils.user_files import check_line

DEFAULT_SEED = 1234
DEFAULT_MAX_MALFORMED = 0.05
WORKERS_PER_CORE = 8


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    r"""What to read, how, and where to write it.

    The names are those of the flags of `tools/preprocess_data.py`.

    Attributes:
        input: files, glob patterns, `-` for the standard input.
        output_prefix: the corpora are `<output_prefix>_<key>_document` (text; `_sentence` with
            `split_sentences`), `<output_prefix>_text_document` (parallel) or
            `<output_prefix>_document` (instruct).
        tokenizer_type: see `load_tokenizer`, as for the four that follow.
        tokenizer_model: as for `load_tokenizer`.
        vocab_file: as for `load_tokenizer`.
        merge_file: as for `load_tokenizer`.
        vocab_size: as for `load_tokenizer`.
        kind: `text`, `parallel` or `instruct`.
        json_keys: keys of a record that become a corpus each (text).
        template: `{en}\\n{zh}` (parallel); `chatflow`, `alpaca`, `chatml` or `tokenizer` (instruct,
            default chatflow).
        append_eod: end each document with the end-of-document token (chatflow and alpaca do so in
            any case).
        split_sentences: make each sentence a sequence (text).
        keep_newlines: sentences keep the white space that follows them.
        shuffle: write the documents in a random order.
        seed: of that order; 1234 when None.
        workers: processes that encode; 1 encodes in this one.
        skip_malformed: leave malformed records out, rather than write nothing.
        max_malformed: with `skip_malformed`, the share of malformed records beyond which nothing is
            written; 0.05 when None.
        max_document_bytes: bytes of the longest record that is read, decompressed; a longer one is
            malformed.
        input_format: `jsonl`, `text` or `parquet`; by the file's name when None.
        lang: language of the text, for the manifest and for `split_sentences` (default there
            `english`).
        log_interval: documents between two reports of progress.
        resume: continue where an earlier run with these options was killed.
    """

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    kind: str = "text"
    json_keys: tuple[str, ...] = ("text",)
    template: str | None = None
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    shuffle: bool = False
    seed: int | None = None
    workers: int = 1
    skip_malformed: bool = False
    max_malformed: float | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    input_format: str | None = None
    lang: str | None = None
    log_interval: int = 1000
    resume: bool = False

    def tokenizer_arguments(self) -> dict[str, Any]:
        """Return the arguments of `load_tokenizer`."""
        names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def prefixes(self) -> dict[str, str]:
        """Return the prefix of each corpus by its key."""
        if self.kind == "text":
            level = "sentence" if self.split_sentences else "document"
            return {key: f"{self.output_prefix}_{key}_{level}" for key in self.json_keys}
        return (
            {"text": f"{self.output_prefix}_text_document"}
            if self.kind == "parallel"
            else {"conversations": f"{self.output_prefix}_document"}
        )

    def unfinished(self) -> str:
        """Return the folder that holds the output until all of it is written."""
        return next(iter(self.prefixes().values())) + ".unfinished"

    def chosen_seed(self) -> int | None:
        """Return the seed of the order; None: the order of the input."""
        return (DEFAULT_SEED if self.seed is None else self.seed) if self.shuffle else None

    def most_malformed(self) -> float:
        """Return the share of malformed records beyond which nothing is written."""
        return DEFAULT_MAX_MALFORMED if self.max_malformed is None else self.max_malformed

    def chosen_template(self) -> str | None:
        """Return the template, by default that of the kind."""
        return (
            DEFAULT_CHAT_TEMPLATE
            if self.kind == "instruct" and self.template is None
            else self.template
        )

    def splitting(self) -> SentenceSplitting | None:
        """Return how texts are split into sentences on this machine.

        Raises:
            DataError: the language is unknown.
        """
        return (
            choose_splitting(self.lang or "english", self.keep_newlines)
            if self.split_sentences
            else None
        )

    def task(self, tokenizer: Tokenizer, splitting: SentenceSplitting | None) -> EncodeTask:
        """Return the task of the workers.

        Raises:
            DataError: the template is the tokenizer's, and it has none.
        """
        if self.kind == "instruct" and self.chosen_template() == TOKENIZER_TEMPLATE:
            from megatron_chatflow.data.chat.jinja_template import check_tokenizer_template

            check_tokenizer_template(tokenizer)
        dtype = best_dtype(tokenizer.vocab_size).__name__
        return EncodeTask(
            self.kind,
            tuple(self.prefixes()),
            self.chosen_template(),
            self.append_eod,
            splitting,
            dtype,
        )


def check(settings: PreprocessOptions) -> None:
    """Check the options against each other.

    Raises:
        DataError: one of them is wrong.
    """
    kind, template = settings.kind, settings.template
    for flag, words in (
        ("--output-prefix", [settings.output_prefix]),
        ("--json-keys", settings.json_keys),
        ("--lang", [settings.lang or ""]),
    ):
        for word in words:
            check_line(flag, word)
    if kind not in KINDS:
        raise DataError(f"--kind {kind} is unknown: give one of {', '.join(KINDS)}")
    if settings.input_format not in (None, *FORMATS):
        raise DataError(
            f"--input-format {settings.input_format} is unknown: give one of {', '.join(FORMATS)}"
        )
    for name, smallest in (
        ("workers", 1),
        ("log_interval", 1),
        ("seed", 0),
        ("max_document_bytes", 1),
    ):
        value = getattr(settings, name)
        if value is not None and value < smallest:
            raise DataError(
                f"--{name.replace('_', '-')} {value} is too few: give at least {smallest}"
            )
    cores = len(os.sched_getaffinity(0))
    if settings.workers > WORKERS_PER_CORE * cores:
        raise DataError(
            f"--workers {settings.workers} is too many for the {cores} cores that this "
            f"process may use: "
            f"give at most {WORKERS_PER_CORE * cores}, best one per core"
        )
    if not os.path.basename(settings.output_prefix):
        raise DataError(
            f"--output-prefix {settings.output_prefix!r} is not a prefix of a file name: give "
            f"one such as out/en"
        )
    if settings.vocab_size is not None and settings.tokenizer_type not in (
        "NullTokenizer",
        "TikTokenizer",
    ):
        raise DataError(
            f"--vocab-size has no meaning for {settings.tokenizer_type}, whose files say "
            f"it: drop the flag"
        )
    if settings.max_malformed is not None:
        if not settings.skip_malformed:
            raise DataError(
                "--max-malformed has no meaning without --skip-malformed: add it, or drop the flag"
            )
        if not 0 <= settings.max_malformed <= 1:
            raise DataError(
                f"--max-malformed {settings.max_malformed:g} is not a share: give a number "
                f"from 0 to 1"
            )
    if settings.seed is not None and not settings.shuffle:
        raise DataError("--seed has no meaning without --shuffle: add it, or drop the flag")
    if settings.keep_newlines and not settings.split_sentences:
        raise DataError(
            "--keep-newlines has no meaning without --split-sentences: documents are kept "
            "unchanged; drop the flag"
        )
    if kind != "text":
        for given, flag in (
            (settings.json_keys != ("text",), "--json-keys"),
            (settings.split_sentences, "--split-sentences"),
        ):
            if given:
                raise DataError(f"{flag} has no meaning with --kind {kind}: drop the flag")
    if kind == "text":
        if template is not None:
            raise DataError(
                "--template has no meaning with --kind text: add --kind parallel or --kind instruct"
            )
        if not settings.json_keys or len(set(settings.json_keys)) != len(settings.json_keys):
            raise DataError(
                f"--json-keys {' '.join(settings.json_keys)} must name at least one key, each once"
            )
        for key in settings.json_keys:
            if "/" in key or os.sep in key:
                raise DataError(
                    f"--json-keys: {key!r} is part of the output's file name and holds a /; "
                    f"rename the key in the input"
                )
    elif kind == "parallel":
        if template is None:
            raise DataError(
                "--kind parallel needs --template, such as '{en}\\n{zh}' with the fields of "
                "a record"
            )
        ParallelTemplate(template)
    elif settings.chosen_template() not in CHAT_TEMPLATES:
        raise DataError(
            f"--template {template} is unknown: give one of {', '.join(CHAT_TEMPLATES)}"
        )


def check_sources(settings: PreprocessOptions, sources: list[InputSource]) -> None:
    """Check the options against the inputs.

    Raises:
        DataError: plain text where records with keys are needed.
    """
    for source in sources:
        if source.format == "text" and (settings.kind != "text" or settings.json_keys != ("text",)):
            raise DataError(
                f"--input {source.path} is plain text without keys: drop --kind and "
                f"--json-keys, or write it as JSON lines"
            )
