"""A chunk of lines to arrays of tokens: what a worker of `preprocess` does."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from megatron_chatflow.data.templates import (
    ANSWER,
    CHAT_TEMPLATES,
    MalformedRecord,
    ParallelTemplate,
    Passage,
    json_kind,
    parse_conversation,
    text_field,
)
from megatron_chatflow.tokenizer import Tokenizer

KINDS = ("text", "parallel", "instruct")
SHOWN = 10
"""How many malformed lines are described in full."""


@dataclass(frozen=True)
class Task:
    """What documents are made of.

    Attributes:
        kind: one of `KINDS`.
        keys: names of the corpora: the JSON keys of text; one name for the other kinds.
        template: fields in a text (parallel) or name of a chat template (instruct).
        append_eod: whether each document ends with the end-of-document token.
        dtype: numpy's name of the token type.
    """

    kind: str
    keys: tuple[str, ...]
    template: str | None
    append_eod: bool
    dtype: str


@dataclass(frozen=True)
class Corpus:
    """Documents of one key, ready to be written.

    Attributes:
        tokens: all tokens [n].
        lengths: tokens of each sequence int32[sequences].
        modes: mode of each sequence int8[sequences].
        sequences: sequences of each document int32[documents].
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
class Encoded:
    """What became of a chunk.

    Attributes:
        corpora: documents by key; none of text when only checked.
        malformed: how many lines are malformed.
        shown: line number and reason of the first `SHOWN` of them.
    """

    corpora: dict[str, Corpus]
    malformed: int
    shown: list[tuple[int, str]]


class Encoder:
    """Turns chunks into tokens, one after the other.

    Args:
        tokenizer: the tokenizer.
        task: what documents are made of.
    """

    def __init__(self, tokenizer: Tokenizer, task: Task) -> None:
        self._tokenizer = tokenizer
        self._task = task
        self._parallel = ParallelTemplate(task.template) if task.kind == "parallel" else None

    def encode(self, data: bytes, first_line: int, format: str, check_only: bool = False) -> Encoded:
        """Encodes the lines of a chunk.

        Args:
            data: whole lines; blank ones are no records.
            first_line: number of the first in its file.
            format: `jsonl` or `text`.
            check_only: look for malformed lines; what is not needed for that is not done.
        """
        read = self._conversation if self._task.kind == "instruct" else self._texts
        malformed: list[tuple[int, str]] = []
        numbers: list[int] = []
        documents: list[Any] = []
        for number, line in enumerate(data.split(b"\n"), first_line):
            if not line.strip():
                continue
            try:
                documents.append(read(_record(line, format)))
                numbers.append(number)
            except MalformedRecord as error:
                malformed.append((number, str(error)))
        corpora: dict[str, Corpus] = {}
        if self._task.kind == "instruct":
            corpora[self._task.keys[0]], refused = self._encode_conversations(documents)
            malformed.extend((numbers[index], reason) for index, reason in refused)
        elif not check_only:
            corpora = {key: self._encode_texts([texts[i] for texts in documents]) for i, key in enumerate(self._task.keys)}
        return Encoded(corpora, len(malformed), sorted(malformed)[:SHOWN])

    def _texts(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the text of a record under each key."""
        if self._parallel is not None:
            return (self._parallel.fill(record),)
        return tuple(text_field(record, key) for key in self._task.keys)

    def _encode_texts(self, texts: list[str]) -> Corpus:
        kept: list[list[int]] = []
        size = 0
        for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
            if ids:
                if self._task.append_eod:
                    ids.append(self._tokenizer.eod)
                kept.append(ids)
                size += len(text.encode())
        lengths = np.fromiter(map(len, kept), np.int32, len(kept))
        one = np.ones(len(kept), np.int32)
        return Corpus(self._flat(kept, lengths), lengths, np.zeros(len(kept), np.int8), one, size, len(texts) - len(kept))

    def _conversation(self, record: Mapping[str, Any]) -> list[Passage]:
        """Returns a record's passages; none when no answer says anything."""
        conversation = parse_conversation(record)
        if not any(turn.output.strip() for turn in conversation.turns):
            return []
        passages = CHAT_TEMPLATES[self._task.template](conversation, self._tokenizer)
        if self._task.append_eod and passages[-1].parts[-1] != self._tokenizer.eod:
            passages[-1] = Passage(ANSWER, (*passages[-1].parts, self._tokenizer.eod))
        return [_merge(passage) for passage in passages]

    def _encode_conversations(self, conversations: list[list[Passage]]) -> tuple[Corpus, list[tuple[int, str]]]:
        """Also returns which conversations are refused, and why.

        Libraries find some control tokens in text whatever they are told (SentencePiece its user-defined symbols); in a conversation that
        would let a user write the assistant's part.
        """
        parts = [part for passages in conversations for passage in passages for part in passage.parts]
        ids = iter(self._tokenizer.encode_batch([part for part in parts if isinstance(part, str)]))
        tokens: list[list[int]] = []
        modes: list[int] = []
        sequences: list[int] = []
        size = 0
        refused: list[tuple[int, str]] = []
        for index, passages in enumerate(conversations):
            texts = [[next(ids) for part in passage.parts if isinstance(part, str)] for passage in passages]
            control = {part for passage in passages for part in passage.parts if isinstance(part, int)}
            smuggled = control.intersection(chain.from_iterable(chain.from_iterable(texts)))
            if smuggled:
                refused.append((index, f"the text holds {self._tokenizer.decode(smuggled)!r}, a control token that only the template may set"))
            elif passages:
                for passage, encoded in zip(passages, texts, strict=True):
                    following = iter(encoded)
                    tokens.append([i for part in passage.parts for i in ([part] if isinstance(part, int) else next(following))])
                    modes.append(passage.mode)
                    size += sum(len(part.encode()) for part in passage.parts if isinstance(part, str))
                sequences.append(len(passages))
        lengths = np.fromiter(map(len, tokens), np.int32, len(tokens))
        empty = len(conversations) - len(sequences) - len(refused)
        return Corpus(self._flat(tokens, lengths), lengths, np.array(modes, np.int8), np.array(sequences, np.int32), size, empty), refused

    def _flat(self, tokens: list[list[int]], lengths: np.ndarray) -> np.ndarray:
        return np.fromiter(chain.from_iterable(tokens), self._task.dtype, int(lengths.sum()))


def _record(line: bytes, format: str) -> Mapping[str, Any]:
    """Reads one line.

    Raises:
        MalformedRecord: it is not UTF-8, not JSON, or not an object.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise MalformedRecord(f"not UTF-8 (byte {error.start} is 0x{line[error.start]:02x})") from error
    if format == "text":
        return {"text": text.removesuffix("\r")}
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise MalformedRecord("JSON nested too deeply") from error
    except ValueError as error:
        raise MalformedRecord(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise MalformedRecord(f"JSON, but {json_kind(record)} and not an object")
    return record


def _merge(passage: Passage) -> Passage:
    """Joins neighbouring texts, so that they are encoded as one."""
    parts: list[str | int] = []
    for part in passage.parts:
        if parts and isinstance(part, str) and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return Passage(passage.mode, tuple(parts))
