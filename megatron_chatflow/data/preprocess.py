"""Text to `.bin/.idx`: the pipeline behind `tools/preprocess_data.py`.

The input is read (and unpacked) in chunks of whole lines, processes parse and encode them, and what they return is written in the order of the
input: the output is the same for every number of workers, and memory is bounded by the chunks in flight. Nothing appears under the final names
before everything is written.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_chatflow.data.builder import IndexedDatasetBuilder
from megatron_chatflow.data.encode import KINDS, SHOWN, Corpus, Encoded, Task
from megatron_chatflow.data.formats import FORMATS, Source, open_sources
from megatron_chatflow.data.indexed import best_dtype
from megatron_chatflow.data.manifest import Manifest
from megatron_chatflow.data.templates import CHAT_TEMPLATES, DEFAULT_CHAT_TEMPLATE, ENDS_WITH_EOD, ParallelTemplate
from megatron_chatflow.data.workers import encoders
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What to read, how, and where to write it; the names are those of the flags of `tools/preprocess_data.py`.

    Attributes:
        input: files, glob patterns, `-` for the standard input.
        output_prefix: the corpora are `<output_prefix>_<key>_document` (text), `<output_prefix>_text_document` (parallel) or
            `<output_prefix>_document` (instruct).
        tokenizer_type: see `load_tokenizer`, as for the four that follow.
        kind: `text`, `parallel` or `instruct`.
        json_keys: keys of a record that become a corpus each (text).
        template: `{en}\\n{zh}` (parallel); `chatflow`, `alpaca` or `chatml` (instruct, default chatflow).
        append_eod: end each document with the end-of-document token (chatflow and alpaca do so in any case).
        workers: processes that encode; 1 encodes in this one.
        skip_malformed: leave malformed lines out, rather than write nothing.
        input_format: `jsonl` or `text`; by the file's name when None.
        lang: language of the text, for the manifest.
        log_interval: documents between two lines of progress.
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
    workers: int = 1
    skip_malformed: bool = False
    input_format: str | None = None
    lang: str | None = None
    log_interval: int = 1000

    def tokenizer_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `load_tokenizer`."""
        names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")
        return {name: getattr(self, name) for name in names}


@dataclass
class Summary:
    """What `preprocess` did.

    Attributes:
        corpora: the manifest of each corpus written, by its prefix.
        malformed: malformed lines left out.
        shown: the first few of them, with file, line number and reason.
        empty: documents left out because they encode to nothing.
        seconds: wall time.
    """

    corpora: dict[str, Manifest]
    malformed: int
    shown: tuple[str, ...]
    empty: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a run has come: documents, bytes of text, seconds, and the share of the stored input that is done (None when its size is not known)."""

    documents: int
    bytes: int
    seconds: float
    done: float | None


class MalformedInput(ValueError):
    """The input has malformed lines and nothing was written; the message names the first few."""


def preprocess(settings: PreprocessSettings, progress: Callable[[Progress], None] = lambda _: None) -> Summary:
    """Encodes the input and writes the corpora with their manifests.

    Args:
        settings: what to do.
        progress: called about every `log_interval` documents.

    Raises:
        ValueError: a setting, an input file or the tokenizer is wrong, or no document is left to write.
        MalformedInput: a line is malformed and `skip_malformed` is off; all input was looked through for the count.
        WorkerDied: a worker was killed.
        OSError: the output cannot be written.
    """
    start = time.perf_counter()
    keys, template = _check(settings)
    sources = open_sources(settings.input, settings.input_format)
    _check_text_sources(settings, sources)
    tokenizer = load_tokenizer(**settings.tokenizer_arguments())
    task = Task(settings.kind, tuple(keys), template, settings.append_eod, np.dtype(best_dtype(tokenizer.vocab_size)).name)
    run = _Run(settings, task, tokenizer, sources, progress, start)
    with ExitStack() as stack:
        stack.enter_context(_output_folder(os.path.dirname(settings.output_prefix)))
        conversations = settings.kind == "instruct"
        builders = {key: stack.enter_context(_Writer(prefix, task.dtype, multimodal=conversations)) for key, prefix in keys.items()}
        run.feed(builders)
        run.check_result(builders)
        manifests = {key: run.manifest(key, builder) for key, builder in builders.items()}
        for key, builder in builders.items():
            builder.finalize(manifests[key])
    corpora = {builder.prefix: manifests[key] for key, builder in builders.items()}
    return Summary(corpora, run.malformed.total(), tuple(run.shown), run.empty.total(), time.perf_counter() - start)


def _check(settings: PreprocessSettings) -> tuple[dict[str, str], str | None]:
    """Checks the settings against each other; returns the prefix of each corpus by its key, and the template."""
    prefix, kind, template = settings.output_prefix, settings.kind, settings.template
    if kind not in KINDS:
        raise ValueError(f"--kind {kind} is unknown: give one of {', '.join(KINDS)}")
    if settings.input_format not in (None, *FORMATS):
        raise ValueError(f"--input-format {settings.input_format} is unknown: give one of {', '.join(FORMATS)}")
    if settings.workers < 1:
        raise ValueError(f"--workers {settings.workers} is too few: give at least 1")
    if not os.path.basename(prefix):
        raise ValueError(f"--output-prefix {prefix!r} is no prefix of a file name: give one such as out/en")
    if settings.vocab_size is not None and settings.tokenizer_type not in ("NullTokenizer", "TikTokenizer"):
        raise ValueError(f"--vocab-size has no meaning for {settings.tokenizer_type}, whose files say it: drop the flag")
    if kind != "text" and settings.json_keys != ("text",):
        raise ValueError(f"--json-keys has no meaning with --kind {kind}: drop the flag")
    if kind == "text":
        if template is not None:
            raise ValueError("--template has no meaning with --kind text: add --kind parallel or --kind instruct")
        if not settings.json_keys or len(set(settings.json_keys)) != len(settings.json_keys):
            raise ValueError(f"--json-keys {' '.join(settings.json_keys)} must name at least one key, each once")
        return {key: f"{prefix}_{key}_document" for key in settings.json_keys}, None
    if kind == "parallel":
        if template is None:
            raise ValueError("--kind parallel needs --template, such as '{en}\\n{zh}' with the fields of a record")
        ParallelTemplate(template)
        return {"text": f"{prefix}_text_document"}, template
    template = DEFAULT_CHAT_TEMPLATE if template is None else template
    if template not in CHAT_TEMPLATES:
        raise ValueError(f"--template {template} is unknown: give one of {', '.join(CHAT_TEMPLATES)}")
    return {"conversations": f"{prefix}_document"}, template


def _check_text_sources(settings: PreprocessSettings, sources: list[Source]) -> None:
    for source in sources:
        if source.format == "text" and (settings.kind != "text" or settings.json_keys != ("text",)):
            raise ValueError(f"--input {source.path} is plain text without keys: drop --kind and --json-keys, or write it as JSON lines")


@contextmanager
def _output_folder(path: str) -> Iterator[None]:
    """Makes the folder if there is none, and takes it away again if nothing was written."""
    if not path or os.path.isdir(path):
        yield
        return
    os.makedirs(path)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.rmdir(path)
        raise


class _Writer(IndexedDatasetBuilder):
    """A builder that takes many documents at once: one by one costs more than short texts take to encode."""

    def add_corpus(self, corpus: Corpus) -> None:
        self._bin.write(corpus.tokens.astype(self.dtype.newbyteorder("<"), copy=False).data)
        self.num_tokens += corpus.tokens.size
        self._documents.frombytes((np.cumsum(corpus.sequences, dtype=np.int64) + len(self._lengths)).tobytes())
        self._lengths.frombytes(corpus.lengths.tobytes())
        if self.multimodal:
            self._modes.frombytes(corpus.modes.tobytes())


@dataclass
class _Run:
    """The state of a run: what was counted so far, `malformed` and `empty` by the number of the source."""

    settings: PreprocessSettings
    task: Task
    tokenizer: Tokenizer
    sources: list[Source]
    progress: Callable[[Progress], None]
    start: float
    documents: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    malformed: Counter[int] = field(default_factory=Counter)
    empty: Counter[int] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)
    reported: int = 0

    def feed(self, builders: Mapping[str, _Writer]) -> None:
        """Reads all sources and writes their documents."""
        starts = [0, *accumulate(source.size for source in self.sources)] if all(source.size is not None for source in self.sources) else None
        chunks = ((number, chunk) for number, source in enumerate(self.sources) for chunk in source.chunks(_CHUNK))
        with encoders(self.settings.workers, self.tokenizer, self.settings.tokenizer_arguments(), self.task) as encode:
            for number, position, encoded in encode(chunks, self._failed):
                self._add(number, encoded, builders)
                self._report((starts[number] + position) / starts[-1] if starts else None)

    def _failed(self) -> bool:
        return bool(self.malformed) and not self.settings.skip_malformed

    def _add(self, source: int, encoded: Encoded, builders: Mapping[str, _Writer]) -> None:
        name = self.sources[source].name
        self.shown.extend(f"{name}, line {number}: {reason}" for number, reason in encoded.shown[: SHOWN - len(self.shown)])
        if encoded.malformed:
            self.malformed[source] += encoded.malformed
        if self._failed():
            return
        for key, corpus in encoded.corpora.items():
            builders[key].add_corpus(corpus)
            self.bytes[key] = self.bytes.get(key, 0) + corpus.bytes
            self.empty[source] += corpus.empty
            self.documents += len(corpus.sequences)

    def _report(self, done: float | None) -> None:
        if self.documents - self.reported >= self.settings.log_interval:
            self.reported = self.documents
            self.progress(Progress(self.documents, sum(self.bytes.values()), time.perf_counter() - self.start, done))

    def _described(self, number: int, source: Source) -> dict[str, Any]:
        how = {"kind": self.task.kind, "template": self.task.template, "lang": self.settings.lang}
        return {
            "name": source.name,
            "size": source.stored_bytes,
            "sha256": source.sha256(),
            **{name: value for name, value in how.items() if value is not None},
            "malformed": self.malformed[number],
            "empty": self.empty[number],
        }

    def check_result(self, builders: Mapping[str, _Writer]) -> None:
        """Refuses a run that has nothing to publish."""
        malformed = self.malformed.total()
        if self._failed():
            raise MalformedInput(
                "\n".join(self.shown) + f"\n{malformed:,} malformed line{'s' * (malformed > 1)}, so nothing was written: "
                "mend the input, or leave such lines out with --skip-malformed"
            )
        for builder in builders.values():
            if builder.num_documents == 0:
                skipped = f"{malformed:,} malformed lines and {self.empty.total():,} empty documents were left out"
                raise ValueError(f"no document is left for {builder.prefix} ({skipped}), so nothing was written: check --input")

    def manifest(self, key: str, builder: _Writer) -> Manifest:
        """Returns the manifest of a corpus."""
        return Manifest(
            tokenizer=self.tokenizer.identity(),
            dtype=self.task.dtype,
            documents=builder.num_documents,
            tokens=builder.num_tokens,
            bytes=self.bytes[key],
            sources=[self._described(number, source) for number, source in enumerate(self.sources)],
            append_eod=self.task.append_eod or self.task.template in ENDS_WITH_EOD,
            conversations=self.task.kind == "instruct",
        )
