"""What a run of `preprocess` reports: its progress, its result, and why it wrote nothing."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.data.corpus.manifest import Manifest
from megatron_chatflow.errors import DataError


@dataclass
class PreprocessSummary:
    """What a run of `preprocess` did.

    Attributes:
        corpora: the manifest of each corpus written, by its prefix.
        malformed: malformed records left out.
        too_long: those of them that are longer than `max_document_bytes`.
        shown: the first few of them, with file, number and reason.
        empty: documents left out because they encode to nothing, or conversations because nothing
            in them is trained on.
        ignored: keys of conversations that nothing reads, and how many records have each.
        bytes: UTF-8 bytes of text that this process and its workers encoded.
        seconds: wall time.
    """

    corpora: dict[str, Manifest]
    malformed: int
    too_long: int
    shown: tuple[str, ...]
    empty: int
    ignored: dict[str, int]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class PreprocessProgress:
    """How far a run has come.

    Attributes:
        documents: written so far.
        bytes: UTF-8 bytes of their text.
        seconds: since this process began.
        done: share of the stored input that is done; None when its size is not known.
        rate: bytes of text per second, since this process began to encode.
        left: seconds until the input is done; None when that is not known.
    """

    documents: int
    bytes: int
    seconds: float
    done: float | None
    rate: float
    left: float | None


class MalformedInput(DataError):
    """Nothing was written because of what the input holds.

    It holds malformed records, of which the message names the first few, or no document at all.
    """
