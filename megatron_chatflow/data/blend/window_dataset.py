"""The base of the text and instruction datasets: numbered windows, shuffled in each epoch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from megatron_chatflow.data.blend.batch import Batch, empty_batch, first_outside
from megatron_chatflow.data.blend.index_shuffle import shuffled_windows
from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.errors import DataError, SampleError

_CHUNK_POSITIONS = 1 << 17


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How the corpora of a curriculum become windows."""

    seq_length: int
    """S, positions in a window."""
    seed: int
    """Decides the order of the windows, together with the domain's name and the epoch."""
    split: str = "969,30,1"
    """Megatron's `--split`, by documents (see `corpus/split.py`).

    It does not cut a domain that has its own validation files (`valid`): then all of `path` is
    for training, all of `valid` for validation, and nothing for the test.
    """
    subset: str = "train"
    """"train", "valid" or "test"."""
    reset_position_ids: bool = False
    """Text only: position_ids restart at the first token of each document."""
    reset_attention_mask: bool = False
    """Text only: segment_ids count the documents in a window; attention is confined to them."""
    eod_mask_loss: bool = False
    """Text only: loss_mask is 0 where the token (not the label) is `eod`, as in Megatron."""
    eod: int | None = None
    """The end-of-document token."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise DataError(f"seq_length {self.seq_length}: write a positive number")


class WindowDataset(ABC):
    """A domain as `num_samples` windows; ordinal j is read in epoch j // num_samples.

    Args:
        name: the domain's name; it and the seed decide the order of the windows.
        dataset: the corpus.
        documents: the documents [begin, end) of the corpus that belong to the domain's subset.
        options: length of the windows, seed, and how text is masked.

    Attributes:
        name, dataset, documents: as given.
        seq_length: S, positions in a window.
        seed: seed of the run.
        num_samples: windows per epoch; 0 when there is nothing to read.
        vocab_size: tokens of the vocabulary, before padding; reading batches checks that all ids
            are below it. None: nothing is checked.
    """

    vocab_size: int | None = None

    def __init__(
        self,
        name: str,
        dataset: IndexedDataset,
        documents: tuple[int, int],
        options: WindowOptions,
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.documents = documents
        self.seq_length = options.seq_length
        self.seed = options.seed
        self.num_samples = 0
        if not dataset.header.contiguous:
            raise DataError(
                f"corpus {dataset.prefix}: the sequences do not fill {dataset.prefix}.bin from its "
                f"start to its end in order (other token type, other index, or rearranged); see "
                f"`chatflow corpus verify {dataset.prefix}` and preprocess it again"
            )

    def __repr__(self) -> str:
        begin, end = self.documents
        size = f"documents {begin}..{end}, {self.num_samples} windows of {self.seq_length}"
        return f"{type(self).__name__}({self.name!r}, {self.dataset.prefix!r}, {size})"

    def epoch_of(self, ordinal: int) -> int:
        """Return the epoch, from 0, in which a sample is read."""
        return int(ordinal) // self.num_samples

    def window_of(self, ordinals: np.ndarray) -> np.ndarray:
        """Return the window that each ordinal reads, int64 [n] (see `index_shuffle.py`)."""
        ordinals = np.asarray(ordinals, np.int64)
        return shuffled_windows(
            ordinals, np.zeros_like(ordinals), np.array([self.num_samples]), (self.name,), self.seed
        )

    def read(self, ordinals: np.ndarray) -> Batch:
        """Read samples by ordinal, int64 [n]; `empty_batch` describes the result."""
        return self.read_window(self.window_of(ordinals))

    def read_window(self, windows: np.ndarray) -> Batch:
        """Read windows by their number in file order, int64 [n], as validation does."""
        windows = np.asarray(windows, np.int64)
        batch = empty_batch(len(windows), self.seq_length)
        if len(windows) and (windows.min() < 0 or windows.max() >= self.num_samples):
            raise IndexError(
                f"domain {self.name}: windows {windows.min()} to {windows.max()} of "
                f"{self.num_samples}"
            )
        self.fill(batch, np.arange(len(windows)), windows)
        row = first_outside(batch, self.vocab_size)
        if row is not None:
            raise self.outside(batch, row, windows[row], f"window {windows[row]}")
        return batch

    def outside(self, batch: Batch, row: int, window: int, which: str) -> SampleError:
        """Return the error for a row of a batch that holds ids outside of the vocabulary.

        Args:
            batch: what was read.
            row: the row.
            window: the window that it holds.
            which: what the message calls it.
        """
        ids = np.unique(np.concatenate([batch["tokens"][row], batch["labels"][row]]))
        ids = ids[(ids < 0) | (ids >= self.vocab_size)]
        shown = ", ".join(map(str, ids[:5].tolist())) + ", ..." * (len(ids) > 5)
        numbers = [document for document, _, _ in self.window_documents(int(window))]
        documents = (
            f"document {numbers[0]}"
            if len(numbers) == 1
            else f"documents {numbers[0]} to {numbers[-1]}"
        )
        return SampleError(
            f"domain {self.name}: {which} ({documents} of {self.dataset.prefix}) holds "
            f"token ids outside of the vocabulary of {self.vocab_size}: "
            f"{shown}; give the tokenizer that made the corpus, or preprocess it again "
            f"(tools/verify_dataset.py {self.dataset.prefix} --vocab-size {self.vocab_size} "
            f"checks all of it)"
        )

    def provenance(self, ordinal: int) -> dict:
        """Return where a sample comes from: `epoch`, and `documents` as in `window_documents`."""
        (window,) = self.window_of(np.array([ordinal])).tolist()
        return {"epoch": self.epoch_of(ordinal), "documents": self.window_documents(window)}

    def fill(self, batch: Batch, rows: np.ndarray, windows: np.ndarray) -> None:
        """Write windows into rows of a batch from `empty_batch`, in chunks that fit the cache."""
        step = max(1, _CHUNK_POSITIONS // self.seq_length)
        for at in range(0, len(rows), step):
            self.fill_chunk(batch, rows[at : at + step], windows[at : at + step])

    @abstractmethod
    def fill_chunk(self, batch: Batch, rows: np.ndarray, windows: np.ndarray) -> None:
        """Write at least one and not too many windows, as `fill` does."""

    @abstractmethod
    def window_documents(self, window: int) -> list[tuple[int, int, int]]:
        """Return (document, first token, stop token) for all tokens that a window reads.

        Tokens are counted within the document.
        """
