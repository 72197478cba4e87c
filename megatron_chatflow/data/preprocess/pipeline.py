"""Text to `.bin/.idx`: the pipeline behind `tools/preprocess_data.py`.

The input is read (and decompressed) in chunks of complete records, processes parse and encode them,
and what they return is written in the order of the input: the output is the same for every number
of workers, and memory is bounded by the chunks in flight. Everything is written into a folder next
to the output, from which a killed run can be resumed (`resume_state.py`); nothing appears under the
final names before everything is written.
"""

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_chatflow import __version__
from megatron_chatflow.data.chat.templates import ENDS_WITH_EOD
from megatron_chatflow.data.corpus.manifest import (
    Manifest,
    file_crc32,
    read_manifest,
    write_manifest,
)
from megatron_chatflow.data.preprocess.encoder import SHOWN, EncodedChunk, EncodeTask
from megatron_chatflow.data.preprocess.external_shuffle import shuffle
from megatron_chatflow.data.preprocess.input_files import InputSource, open_sources
from megatron_chatflow.data.preprocess.options import PreprocessOptions, check, check_sources
from megatron_chatflow.data.preprocess.resume_state import (
    InputChanged,
    InputPosition,
    ResumeState,
    discard_state,
    has_state,
    load_state,
    locked_folder,
    publish_corpus,
    rest_of_source,
    save_state,
    skip_source,
)
from megatron_chatflow.data.preprocess.sentence_split import NLTK_LANGUAGES, without_punkt
from megatron_chatflow.data.preprocess.summary import (
    MalformedInput,
    PreprocessProgress,
    PreprocessSummary,
)
from megatron_chatflow.data.preprocess.token_files import TokenFiles
from megatron_chatflow.data.preprocess.worker_pool import SourceChunk, encoder_pool
from megatron_chatflow.errors import ChatflowError, DataError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

_CHUNK = 1 << 18
_MOST_IGNORED = 1000
"""Names of keys that are counted separately, for each source."""
_CHECKPOINT_SECONDS = 1.0
_CHECKPOINT_SHARE = 0.02
"""How often the state is saved: about every second.

Less often where that would take more than this share of the time.
"""

logger = logging.getLogger(__name__)


def preprocess(
    settings: PreprocessOptions,
    progress: Callable[[PreprocessProgress], None] = lambda _: None,
) -> PreprocessSummary:
    """Encode the input and write the corpora with their manifests.

    Args:
        settings: what to do.
        progress: called about every `log_interval` documents.

    Raises:
        DataError: a setting, an input file or the tokenizer is wrong, or there is an unfinished run
            that `resume` does not fit.
        MalformedInput: a record is malformed and `skip_malformed` is off (all input was read for
            the count), more than the share `max_malformed` of them is, or no document is left to
            write.
        WorkerDied: a worker was killed.
        OSError: the output cannot be written.
    """
    start = time.perf_counter()
    check(settings)
    sources = open_sources(settings.input, settings.input_format, settings.max_document_bytes)
    check_sources(settings, sources)
    splitting = settings.splitting()
    tokenizer = load_tokenizer(**settings.tokenizer_arguments())
    task = settings.task(tokenizer, splitting)
    folder = settings.unfinished()
    with locked_folder(folder):
        state = _begin(settings, _decides(settings, task, tokenizer, sources), sources)
        if (
            splitting is not None
            and splitting.lang in NLTK_LANGUAGES
            and splitting.method != "punkt"
        ):
            logger.info(without_punkt(splitting))
        run = _Run(settings, task, tokenizer, sources, state, progress, start)
        try:
            if not state.complete:
                run.write()
        except InputChanged:
            raise
        except ChatflowError:
            discard_state(folder)
            raise
        for key, prefix in settings.prefixes().items():
            publish_corpus(run.path(key), prefix)
        discard_state(folder)
    manifests = {prefix: read_manifest(prefix) for prefix in settings.prefixes().values()}
    corpora = {prefix: manifest for prefix, manifest in manifests.items() if manifest is not None}
    left_out = sum(state.malformed), sum(state.too_long), tuple(state.shown), sum(state.empty)
    ignored = sum(map(Counter, state.ignored), Counter())
    return PreprocessSummary(
        corpora, *left_out, dict(ignored), run.new_bytes, time.perf_counter() - start
    )


def _begin(
    settings: PreprocessOptions,
    decides: dict[str, Any],
    sources: list[InputSource],
) -> ResumeState:
    """Return the state to resume from, or a new one."""
    folder = settings.unfinished()
    if has_state(folder):
        if not settings.resume:
            raise DataError(
                f"{folder} holds an unfinished run of this output: continue from there with "
                f"--resume, or delete the folder to start over"
            )
        state = load_state(folder, decides)
        documents = next(iter(state.counts.values())).documents
        logger.info(f"resuming the run in {folder}, which has {documents:,} documents")
        for source in sources:
            if source.size is None:
                logger.info(
                    f"{source.name} is read again from its start and compared: the same "
                    f"stream must come again"
                )
        return state
    if settings.resume:
        logger.info(
            "--resume: there is no unfinished run of this output, so this one starts at the "
            "beginning"
        )
    zeros = [0] * len(sources)
    return ResumeState(
        decides,
        records=zeros,
        malformed=zeros.copy(),
        too_long=zeros.copy(),
        empty=zeros.copy(),
        ignored=[{} for _ in sources],
    )


def _decides(
    settings: PreprocessOptions, task: EncodeTask, tokenizer: Tokenizer, sources: list[InputSource]
) -> dict[str, Any]:
    """Return what the output depends on, by flag or in words, as JSON values."""
    return {
        "version of megatron_chatflow": __version__,
        "--kind": task.kind,
        "--json-keys": list(task.keys),
        "--template": task.template,
        "--append-eod": task.append_eod,
        "--split-sentences": dataclasses.asdict(task.splitting) if task.splitting else None,
        "--seed": settings.chosen_seed(),
        "--skip-malformed": settings.skip_malformed,
        "--max-malformed": settings.most_malformed(),
        "--max-document-bytes": settings.max_document_bytes,
        "--lang": settings.lang,
        "--input-format": [source.format for source in sources],
        "tokenizer": tokenizer.identity(),
        "--input": [[source.name, source.size] for source in sources],
    }


@dataclass
class _Run:
    """A run in progress: its state, and what is counted since this process began."""

    settings: PreprocessOptions
    task: EncodeTask
    tokenizer: Tokenizer
    sources: list[InputSource]
    state: ResumeState
    progress: Callable[[PreprocessProgress], None]
    start: float
    failed: bool = False
    new_bytes: int = 0
    began: tuple[float, float] | None = None
    reported: int = 0
    due: float = 0.0

    def path(self, key: str, shuffled: bool | None = None) -> str:
        """Return where the files of a corpus are until they are published."""
        name = os.path.basename(self.settings.prefixes()[key])
        shuffled = self.settings.shuffle if shuffled is None else shuffled
        return os.path.join(self.settings.unfinished(), name + ".shuffled" * shuffled)

    def write(self) -> None:
        """Read the rest of the sources and write everything that is to be published."""
        with ExitStack() as stack:
            corpora = {
                key: stack.enter_context(
                    TokenFiles(
                        self.path(key, False),
                        self.task.dtype,
                        self.task.kind == "instruct",
                        self.state.counts.get(key),
                    )
                )
                for key in self.task.keys
            }
            self.state.counts = {key: files.counts for key, files in corpora.items()}
            self._encode(corpora)
            self._check_result()
            self._save(corpora, InputPosition(len(self.sources)))
            seed = self.settings.chosen_seed()
            if seed is not None:
                corpora = {
                    key: stack.enter_context(shuffle(files, self.path(key), seed))
                    for key, files in corpora.items()
                }
            for files in corpora.values():
                files.write_index(files.path + ".idx")
                write_manifest(files.path, self._manifest(files))
        self.state.complete = True
        save_state(self.settings.unfinished(), self.state)

    def _encode(self, corpora: dict[str, TokenFiles]) -> None:
        sizes = [source.size for source in self.sources if source.size is not None]
        total = sum(sizes) if len(sizes) == len(self.sources) else None
        self.due = time.perf_counter() + _CHECKPOINT_SECONDS
        with encoder_pool(
            self.settings.workers, self.tokenizer, self.settings.tokenizer_arguments(), self.task
        ) as encode:
            for done, encoded in encode(self._chunks(), lambda: self.failed):
                self._add(done.source, encoded, corpora)
                if self.failed:
                    continue
                if time.perf_counter() >= self.due:
                    began = time.perf_counter()
                    self._save(corpora, InputPosition(done.source, done.next, done.checksum))
                    now = time.perf_counter()
                    self.due = now + max(_CHECKPOINT_SECONDS, (now - began) / _CHECKPOINT_SHARE)
                share = (sum(sizes[: done.source]) + done.position) / total if total else None
                self._report(share)

    def _chunks(self) -> Iterator[SourceChunk]:
        """Yield the chunks that are not in the state yet."""
        place = self.state.place
        for number, source in enumerate(self.sources):
            if number < place.source:
                skip_source(source, self.state.read[number], _CHUNK)
                continue
            columns = self.task.columns()
            for chunk in (
                rest_of_source(source, place, columns, _CHUNK)
                if number == place.source
                else source.chunks(_CHUNK, columns)
            ):
                if chunk.too_long and not self.settings.skip_malformed:
                    # at once, without looking for the end of it: an input may have none
                    raise MalformedInput(
                        f"{source.name}, {source.record} {chunk.first}: {chunk.too_long}, "
                        f"so nothing was written: "
                        "correct the input, give a larger --max-document-bytes, or leave "
                        "such records out with --skip-malformed"
                    )
                yield number, chunk

    def _add(self, source: int, encoded: EncodedChunk, corpora: dict[str, TokenFiles]) -> None:
        named = self.sources[source]
        shown = self.state.shown
        shown.extend(
            f"{named.name}, {named.record} {number}: {reason}"
            for number, reason in encoded.shown[: SHOWN - len(shown)]
        )
        self.state.records[source] += encoded.records
        self.state.malformed[source] += encoded.malformed
        self.state.too_long[source] += encoded.too_long
        self.failed = self.failed or (encoded.malformed > 0 and not self.settings.skip_malformed)
        if self.failed:
            return
        ignored = self.state.ignored[source]
        for key, count in encoded.ignored.items():
            key = key if key in ignored or len(ignored) < _MOST_IGNORED else "(others)"
            ignored[key] = ignored.get(key, 0) + count
        for key, corpus in encoded.corpora.items():
            corpora[key].append(corpus)
            self.state.empty[source] += corpus.empty
            self.new_bytes += corpus.bytes

    def _save(self, corpora: dict[str, TokenFiles], place: InputPosition) -> None:
        for files in corpora.values():
            files.sync()
        self.state.place = place
        for source in self.sources[len(self.state.read) : place.source]:
            self.state.read.append(
                {
                    "size": source.stored_bytes,
                    "sha256": source.sha256(),
                    "modified": source.modified,
                }
            )
        save_state(self.settings.unfinished(), self.state)

    def _report(self, done: float | None) -> None:
        seconds = time.perf_counter() - self.start
        if self.began is None:
            self.began = (seconds, done or 0.0)
        documents = sum(counts.documents for counts in self.state.counts.values())
        if documents - self.reported < self.settings.log_interval:
            return
        self.reported = documents
        passed, advance = seconds - self.began[0], (done or 0.0) - self.began[1]
        left = passed * (1 - done) / advance if done is not None and advance > 0 else None
        text = sum(counts.bytes for counts in self.state.counts.values())
        self.progress(
            PreprocessProgress(documents, text, seconds, done, self.new_bytes / seconds, left)
        )

    def _check_result(self) -> None:
        """Refuse a run that has nothing to publish."""
        malformed, empty = sum(self.state.malformed), sum(self.state.empty)
        if self.failed:
            raise MalformedInput(
                "\n".join(self.state.shown)
                + f"\n{malformed:,} malformed record{'s' * (malformed > 1)}, so nothing was "
                f"written: "
                "fix the input, or leave them out with --skip-malformed"
            )
        records, most = sum(self.state.records), self.settings.most_malformed()
        if malformed > Fraction(str(most)) * records:
            raise MalformedInput(
                "\n".join(self.state.shown)
                + f"\n{malformed:,} of {records:,} records are malformed, more than the share "
                f"of {most:g} that "
                "--max-malformed allows, so nothing was written: correct the input, or give "
                "a larger --max-malformed"
            )
        for key, counts in self.state.counts.items():
            if counts.documents == 0:
                skipped = (
                    f"{malformed:,} malformed records and {empty:,} empty documents were left out"
                )
                raise MalformedInput(
                    f"no document is left for {self.settings.prefixes()[key]} ({skipped}), "
                    f"so nothing was written: check --input"
                )

    def _manifest(self, files: TokenFiles) -> Manifest:
        return Manifest(
            tokenizer=self.tokenizer.identity(),
            dtype=self.task.dtype,
            documents=files.counts.documents,
            tokens=files.counts.tokens,
            bytes=files.counts.bytes,
            sources=[self._described(number, source) for number, source in enumerate(self.sources)],
            append_eod=self.task.append_eod or self.task.template in ENDS_WITH_EOD,
            conversations=self.task.kind == "instruct",
            crc32={"bin": f"{files.counts.crc32:08x}", "idx": file_crc32(files.path + ".idx")},
        )

    def _described(self, number: int, source: InputSource) -> dict[str, Any]:
        splitting = self.task.splitting
        how = {
            "kind": self.task.kind,
            "template": self.task.template,
            "lang": splitting.lang if splitting else self.settings.lang,
            "sentences": splitting.method if splitting else None,
            "shuffled": self.settings.chosen_seed(),
        }
        read = self.state.read[number]
        return {
            "name": source.name,
            "size": read["size"],
            "sha256": read["sha256"],
            **{name: value for name, value in how.items() if value is not None},
            "malformed": self.state.malformed[number],
            **({"too_long": self.state.too_long[number]} if self.state.too_long[number] else {}),
            "empty": self.state.empty[number],
            **({"ignored": self.state.ignored[number]} if self.state.ignored[number] else {}),
        }
