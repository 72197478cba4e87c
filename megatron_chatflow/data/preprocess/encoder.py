"""A chunk of records to arrays of tokens: what a worker of `preprocess` does."""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from megatron_chatflow.data.chat.conversations import parse_conversation
from megatron_chatflow.data.chat.templates import (
    CHAT_TEMPLATES,
    TOKENIZER_TEMPLATE,
    Conversation,
    MalformedRecord,
    ParallelTemplate,
    Passage,
    mark_untrained,
    texts_field,
)
from megatron_chatflow.data.preprocess.input_files import Chunk
from megatron_chatflow.data.preprocess.records import all_records, each_record
from megatron_chatflow.data.preprocess.sentence_split import SentenceSplitting, splitter
from megatron_chatflow.errors import ChatflowError, DataError
from megatron_chatflow.tokenizer import Tokenizer
from megatron_chatflow.tokenizer.long_text import PIECE, encode_in_pieces

KINDS = ("text", "parallel", "instruct")
SHOWN = 10
"""How many malformed records are described in full."""

Document = str | list[str]
"""A text, or its sentences."""
Ids = list[int] | array
"""Tokens of a text."""


@dataclass(frozen=True)
class EncodeTask:
    """What documents are made of.

    Attributes:
        kind: one of `KINDS`.
        keys: names of the corpora: the JSON keys of text; one name for the other kinds.
        template: fields in a text (parallel) or name of a chat template (instruct).
        append_eod: whether each document ends with the end-of-document token.
        splitting: how texts are split into sentences; None: they are not.
        dtype: numpy's name of the token type.
    """

    kind: str
    keys: tuple[str, ...]
    template: str | None
    append_eod: bool
    splitting: SentenceSplitting | None
    dtype: str

    def columns(self) -> list[str] | None:
        """Return the fields of a record that are needed; None where that depends on the record."""
        if self.kind == "instruct":
            return None
        if self.kind == "parallel" and self.template is not None:
            return ParallelTemplate(self.template).fields
        return list(self.keys)


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of one key, ready to be written.

    Attributes:
        tokens: all tokens [n].
        lengths: tokens of each sequence int32 [sequences].
        modes: mode of each sequence int8 [sequences].
        sequences: sequences of each document int32 [documents].
        bytes: UTF-8 bytes of the text.
        empty: documents left out because they encode to nothing.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    modes: np.ndarray
    sequences: np.ndarray
    bytes: int
    empty: int


@dataclass(frozen=True)
class EncodedChunk:
    """The result of encoding a chunk.

    Attributes:
        corpora: documents by key; empty for text when only checked.
        records: how many records there are, malformed ones included.
        malformed: how many records are malformed.
        shown: number and reason of the first `SHOWN` of them.
        ignored: how many records have each key that nothing reads.
        too_long: how many of the malformed records are longer than the limit.
    """

    corpora: dict[str, EncodedDocuments]
    records: int
    malformed: int
    shown: list[tuple[int, str]]
    ignored: dict[str, int] = field(default_factory=dict)
    too_long: int = 0


class Encoder:
    """Turns chunks into tokens, one after the other."""

    def __init__(self, tokenizer: Tokenizer, task: EncodeTask) -> None:
        self._tokenizer = tokenizer
        self._task = task
        template = task.template if task.kind == "parallel" else None
        self._parallel = None if template is None else ParallelTemplate(template)
        self._fields = [itemgetter(name) for name in task.columns() or ()]
        self._split = splitter(task.splitting) if task.splitting else None

    def encode(self, chunk: Chunk, check_only: bool = False) -> EncodedChunk:
        """Encode the records of a chunk.

        Args:
            chunk: complete records; blank lines are not records.
            check_only: check for malformed records; what is not needed for that is not done.
        """
        if chunk.too_long:
            return EncodedChunk({}, 1, 1, [(chunk.first, chunk.too_long)], too_long=1)
        if self._task.kind == "instruct":
            return self._conversations(chunk)
        malformed: list[tuple[int, str]] = []
        columns = self._all_texts(chunk.data, chunk.format)
        if columns is None:
            columns, malformed = self._each_text(chunk)
        corpora = (
            {}
            if check_only
            else {
                key: self._encode_documents(texts)
                for key, texts in zip(self._task.keys, columns, strict=True)
            }
        )
        return EncodedChunk(
            corpora, len(columns[0]) + len(malformed), len(malformed), malformed[:SHOWN]
        )

    def _all_texts(self, data: bytes | bytearray, format: str) -> list[list[Document]] | None:
        """Return the documents of each key; None when a record needs a closer look."""
        try:
            records = all_records(data, format)
            columns: list[Any] = [list(map(field, records)) for field in self._fields]
            if any(set(map(type, column)) - {str} for column in columns):
                return None
            for column in columns:
                "".join(column).encode()
        except (DataError, ValueError, RecursionError, KeyError, TypeError):
            return None
        return [[*self._parallel.fill_all(columns)]] if self._parallel else columns

    def _each_text(self, chunk: Chunk) -> tuple[list[list[Document]], list[tuple[int, str]]]:
        """Return the documents of each key, and what is malformed."""
        documents, malformed = [], []
        for number, record in each_record(chunk):
            try:
                documents.append(self._texts(record))
            except MalformedRecord as error:
                malformed.append((number, str(error)))
        return [[texts[i] for texts in documents] for i in range(len(self._task.keys))], malformed

    def _texts(self, record: Mapping[str, Any] | MalformedRecord) -> tuple[Document, ...]:
        """Return the document of a record under each key."""
        if isinstance(record, MalformedRecord):
            raise record
        if self._parallel is not None:
            return (self._parallel.fill(record),)
        return tuple(texts_field(record, key) for key in self._task.keys)

    def _encode_documents(self, documents: list[Document]) -> EncodedDocuments:
        if self._split is None and not any(isinstance(document, list) for document in documents):
            return self._encode_texts(documents)
        split = self._split or (lambda text: [text])
        return self._encode_sentences(
            [split(document) if isinstance(document, str) else document for document in documents]
        )

    def _encode_texts(self, texts: list[Any]) -> EncodedDocuments:
        """Encode documents of one sequence each."""
        encoded = self._ids(texts)
        kept = [ids for ids in encoded if ids]
        empty = (
            [text for text, ids in zip(texts, encoded, strict=True) if not ids]
            if len(kept) < len(encoded)
            else []
        )
        if self._task.append_eod:
            for ids in kept:
                ids.append(self._tokenizer.eod)
        lengths = _lengths(kept)
        return EncodedDocuments(
            tokens=self._flat(kept, lengths),
            lengths=lengths,
            modes=np.zeros(len(kept), np.int8),
            sequences=np.ones(len(kept), np.int32),
            bytes=_size(texts) - _size(empty),
            empty=len(empty),
        )

    def _encode_sentences(self, documents: list[list[str]]) -> EncodedDocuments:
        """Encode documents of one sequence per sentence.

        Sentences that encode to nothing are left out; the end-of-document token belongs to a
        document's last sentence.
        """
        sentences = list(chain.from_iterable(documents))
        encoded = self._ids(sentences)
        kept = np.flatnonzero(_lengths(encoded))
        owners = np.repeat(np.arange(len(documents)), _lengths(documents))[kept]
        sequences = np.bincount(owners, minlength=len(documents))
        sequences = sequences[sequences > 0]
        if self._task.append_eod:
            for last in kept[np.cumsum(sequences) - 1].tolist():
                encoded[last].append(self._tokenizer.eod)
        lists = [encoded[index] for index in kept.tolist()]
        lengths = _lengths(lists)
        return EncodedDocuments(
            tokens=self._flat(lists, lengths),
            lengths=lengths,
            modes=np.zeros(len(lists), np.int8),
            sequences=sequences.astype(np.int32),
            bytes=_size([sentences[index] for index in kept.tolist()]),
            empty=len(documents) - len(sequences),
        )

    def _conversations(self, chunk: Chunk) -> EncodedChunk:
        malformed: list[tuple[int, str]] = []
        numbers: list[int] = []
        conversations: list[list[Passage]] = []
        ignored: Counter[str] = Counter()
        for number, record in each_record(chunk):
            try:
                conversations.append(self._conversation(record, ignored))
                numbers.append(number)
            except MalformedRecord as error:
                malformed.append((number, str(error)))
            except ChatflowError as error:
                raise DataError(f"record {number}: {error}") from error
        corpus, refused = self.encode_conversations(conversations)
        malformed.extend((numbers[index], reason) for index, reason in refused)
        records = len(numbers) + len(malformed) - len(refused)
        return EncodedChunk(
            {self._task.keys[0]: corpus},
            records,
            len(malformed),
            sorted(malformed)[:SHOWN],
            dict(ignored),
        )

    def _conversation(
        self, record: Mapping[str, Any] | MalformedRecord, ignored: Counter[str]
    ) -> list[Passage]:
        """Return a record's passages, none when no answer is trained on.

        Keys that nothing reads are counted in `ignored`.
        """
        if isinstance(record, MalformedRecord):
            raise record
        conversation = parse_conversation(record)
        ignored.update(key[:100] for key in self._unread(conversation))
        if not any(conversation.trained):
            return []
        template = self._task.template
        assert template is not None, "an instruction corpus has a template"
        passages = CHAT_TEMPLATES[template](conversation, self._tokenizer)
        passages = mark_untrained(passages, conversation.trained)
        if self._task.append_eod and passages[-1].parts[-1] != self._tokenizer.eod:
            passages[-1] = Passage(passages[-1].mode, (*passages[-1].parts, self._tokenizer.eod))
        return passages

    def _unread(self, conversation: Conversation) -> list[str]:
        """Return the keys that nothing reads.

        A tokenizer's chat template is given those of messages, and may read them.
        """
        template = (
            (self._tokenizer.chat_template or "")
            if self._task.template == TOKENIZER_TEMPLATE
            else ""
        )
        return [
            key
            for key in conversation.ignored
            if not ("[]." in key and key.partition("[].")[2] in template)
        ]

    def encode_conversations(
        self, conversations: list[list[Passage]]
    ) -> tuple[EncodedDocuments, list[tuple[int, str]]]:
        """Return the tokens of conversations, and which are refused, and why.

        Libraries find some control tokens in text in any case (SentencePiece its user-defined
        symbols); in a conversation that would let a user write the assistant's part.
        """
        conversations = [[_merge(passage) for passage in passages] for passages in conversations]
        parts = [
            part for passages in conversations for passage in passages for part in passage.parts
        ]
        ids = iter(self._ids([part for part in parts if isinstance(part, str)]))
        tokens: list[Ids] = []
        modes: list[int] = []
        sequences: list[int] = []
        size = 0
        refused: list[tuple[int, str]] = []
        for index, passages in enumerate(conversations):
            texts = [
                [next(ids) for part in passage.parts if isinstance(part, str)]
                for passage in passages
            ]
            control = {
                part for passage in passages for part in passage.parts if isinstance(part, int)
            }
            smuggled = control.intersection(chain.from_iterable(chain.from_iterable(texts)))
            if smuggled:
                refused.append(
                    (
                        index,
                        (
                            f"the text holds {self._tokenizer.decode(smuggled)!r}, a control "
                            f"token that only the template may set"
                        ),
                    )
                )
            elif passages:
                for passage, encoded in zip(passages, texts, strict=True):
                    following = iter(encoded)
                    pieces = (
                        [part] if isinstance(part, int) else next(following)
                        for part in passage.parts
                    )
                    tokens.append(_joined(list(pieces)))
                    modes.append(passage.mode)
                    size += sum(
                        len(part.encode()) for part in passage.parts if isinstance(part, str)
                    )
                sequences.append(len(passages))
        lengths = _lengths(tokens)
        empty = len(conversations) - len(sequences) - len(refused)
        return EncodedDocuments(
            self._flat(tokens, lengths),
            lengths,
            np.array(modes, np.int8),
            np.array(sequences, np.int32),
            size,
            empty,
        ), refused

    def _ids(self, texts: list[Any]) -> list[Ids]:
        """Return the tokens of each text.

        They are lists, or arrays where there is much text, which take a tenth of the memory.
        """
        if sum(map(len, texts)) <= 2 * PIECE:
            return [*self._tokenizer.encode_batch(texts)]
        return [encode_in_pieces(self._tokenizer, text) for text in texts]

    def _flat(self, tokens: list[Ids], lengths: np.ndarray) -> np.ndarray:
        return np.fromiter(chain.from_iterable(tokens), self._task.dtype, int(lengths.sum()))


def _joined(pieces: list[Ids]) -> Ids:
    if not any(isinstance(piece, array) for piece in pieces):
        return list(chain.from_iterable(pieces))
    result = array("i")
    for piece in pieces:
        result.extend(piece)
    return result


def _lengths(lists: Sequence[Sequence[Any]]) -> np.ndarray:
    return np.fromiter(map(len, lists), np.int32, len(lists))


def _size(texts: Sequence[str]) -> int:
    """Return the UTF-8 bytes of all texts."""
    return len("".join(texts).encode())


def _merge(passage: Passage) -> Passage:
    """Join neighboring texts, so that they are encoded as one."""
    parts: list[str | int] = []
    for part in passage.parts:
        if parts and isinstance(part, str) and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return Passage(passage.mode, tuple(parts))
