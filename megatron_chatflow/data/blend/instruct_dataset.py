"""Instruction domains: complete conversations packed into windows.

They are trained on the answers only, or on prompts as well.
"""

import dataclasses

import numpy as np

from megatron_chatflow.data.blend.batch import Batch, concatenated_ranges, segments_of
from megatron_chatflow.data.blend.packing import pack, positions
from megatron_chatflow.data.blend.window_dataset import WindowDataset, WindowOptions
from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.data.corpus.verify import index_errors
from megatron_chatflow.errors import DataError

_BLOCK = 1 << 18
"""Conversations that are counted together when a corpus is opened."""


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What a domain does not train on because windows are too short for it.

    Attributes:
        conversations: all of the domain.
        left_out: conversations of two tokens or more without one with loss among their first S + 1,
            which no window holds.
        cut: conversations longer than S + 1 tokens that windows hold, without their end.
        tokens: tokens with loss, if windows were long enough for all.
        lost_tokens: of these, the ones that are in no window.
    """

    conversations: int
    left_out: int
    cut: int
    tokens: int
    lost_tokens: int


class InstructDataset(WindowDataset):
    """The conversations of a corpus with sequence modes, packed into windows of S positions.

    A conversation of L tokens t takes L - 1 positions: tokens t[0] .. t[L-2], labels t[1] ..
    t[L-1]. loss_mask is 1 where the label is in a sequence of mode 0 (an answer), with
    `train_on_prompt` everywhere. Each conversation is a separate segment, its position_ids start at
    0, and no label belongs to another conversation than its token. What is longer than S + 1 tokens
    is cut there; where that leaves no label with loss, the conversation is left out, so every
    window has one. The rest of a window is padded with token 0, loss_mask 0, and a separate
    segment.

    The packing is a function of S and of the lengths of the conversations that are not left out,
    the same in every epoch; it is made at every opening. The windows are shuffled as those of text
    domains are.

    Args:
        name, dataset, documents, options: as in `WindowDataset`.
        train_on_prompt: whether labels in prompts (mode 1) carry loss as well.

    Attributes:
        packing: which conversations each window holds; conversations are numbered from
            `documents[0]`.
        truncation: what is not trained on because it is longer than a window.

    Raises:
        DataError: the corpus has no sequence modes, its sequences are not stored in order, or its
            index is damaged.
    """

    def __init__(
        self,
        name: str,
        dataset: IndexedDataset,
        documents: tuple[int, int],
        options: WindowOptions,
        *,
        train_on_prompt: bool = False,
    ) -> None:
        super().__init__(name, dataset, documents, options)
        self.train_on_prompt = train_on_prompt
        if dataset.sequence_modes is None:
            raise DataError(
                f"corpus {dataset.prefix}: it has no sequence modes, so prompts and answers "
                f"cannot be distinguished"
            )
        for problem in index_errors(dataset):
            raise DataError(f"corpus {dataset.prefix}: {problem}: preprocess it again")
        lengths = np.diff(dataset.document_starts(np.arange(documents[0], documents[1] + 1)))
        trained, kept = self._count_trained(lengths)
        left_out = (lengths > 1) & (kept == 0)
        self.packing = pack(np.where(left_out, 0, lengths), self.seq_length)
        self.num_samples = self.packing.num_windows
        total = int(trained.sum())
        self.truncation = Truncation(
            len(lengths), int(left_out.sum()), self.packing.num_cut, total, total - int(kept.sum())
        )

    def _count_trained(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels with loss of each conversation, in total and in its first S + 1 tokens.

        Both are int64 [conversations].
        """
        entire = np.maximum(lengths.astype(np.int64) - 1, 0)
        kept = positions(lengths, self.seq_length)
        if self.train_on_prompt:
            return entire, kept
        trained = self._count_answers(np.arange(len(lengths)), entire)
        cut = np.flatnonzero(kept < entire)
        trained_kept = trained.copy()
        trained_kept[cut] = self._count_answers(cut, kept[cut])
        return trained, trained_kept

    def _count_answers(self, conversations: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Return how many of the labels t[1] .. t[size] of each conversation are in answers.

        Returns:
            int64 [conversations].
        """
        counts = np.zeros(len(conversations), np.int64)
        for begin in range(0, len(conversations), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            document = conversations[block] + self.documents[0]
            which, labels, answer = self._labels(document, size[block])
            counts[block] = np.bincount(which, labels * answer, len(document))
        return counts

    def fill_chunk(self, batch: Batch, rows: np.ndarray, windows: np.ndarray) -> None:
        """See `WindowDataset.fill_chunk`."""
        document, which = self._conversations(windows)
        start = self.dataset.document_starts(document)
        size = positions(self.dataset.document_starts(document + 1) - start, self.seq_length)
        shape = len(windows), self.seq_length

        # The windows, one after the other, are a row of segments: the conversations of a window,
        # then its padding, which may be empty. `sizes` are their positions, [segments].
        used = np.bincount(which, size, len(windows)).astype(np.int64)
        last = np.cumsum(np.bincount(which, minlength=len(windows)))
        sizes = np.insert(size, last, self.seq_length - used)
        # For each position, [windows * S]: its token's place in the .bin, and whether it has loss.
        segment_ids, position_ids = segments_of((np.cumsum(sizes) - sizes)[sizes > 0], *shape)
        source = np.repeat(np.insert(start, last, 0), sizes) + position_ids.reshape(-1)
        trained = np.repeat(np.insert(np.ones(len(size), bool), last, False), sizes)
        if not self.train_on_prompt:
            trained[trained] = self._answers(document, size)

        batch["tokens"][rows] = self.dataset.tokens.take(source, mode="clip").reshape(shape)
        batch["labels"][rows] = self.dataset.tokens.take(source + 1, mode="clip").reshape(shape)
        batch["loss_mask"][rows] = trained.reshape(shape)
        batch["position_ids"][rows] = position_ids
        batch["segment_ids"][rows] = segment_ids
        for window in np.flatnonzero(used < self.seq_length):
            batch["tokens"][rows[window], used[window] :] = 0
            batch["labels"][rows[window], used[window] :] = 0

    def window_documents(self, window: int) -> list[tuple[int, int, int]]:
        """See `WindowDataset.window_documents`: conversations from their first token."""
        document, _ = self._conversations(np.array([window]))
        lengths = self.dataset.document_starts(document + 1) - self.dataset.document_starts(
            document
        )
        return [
            (d, 0, min(n, self.seq_length + 1))
            for d, n in zip(document.tolist(), lengths.tolist(), strict=True)
        ]

    def _conversations(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of the windows, and which of the windows each is in.

        Both are int64 [conversations].
        """
        begin = self.packing.starts[windows]
        which, within = concatenated_ranges(self.packing.starts[windows + 1] - begin)
        return self.packing.order[begin[which] + within].astype(np.int64) + self.documents[0], which

    def _answers(self, document: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Return whether the labels t[1] .. t[size] of each document are in an answer.

        Returns:
            bool [sum(size)].
        """
        _, labels, answer = self._labels(document, size)
        return np.repeat(answer, labels)

    def _labels(
        self, document: np.ndarray, size: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the labels in each sequence of documents.

        Returns:
            which document each sequence belongs to, and how many of its labels t[1] .. t[size] it
            has: int64 [sequences] each; and whether it is an answer: bool [sequences].
        """
        # All sequences of the documents, one after the other: [sequences].
        begin = self.dataset.document_indices[document]
        which, within = concatenated_ranges(self.dataset.document_indices[document + 1] - begin)
        sequence = begin[which] + within
        first = (
            self.dataset.sequence_pointers[sequence] // self.dataset.dtype.itemsize
            - self.dataset.document_starts(document)[which]
        )
        # Tokens first .. last - 1 of the document, of which 1 .. size are labels that are read.
        last = first + self.dataset.sequence_lengths[sequence]
        labels = np.minimum(last, size[which] + 1) - np.clip(first, 1, size[which] + 1)
        modes = self.dataset.sequence_modes
        assert modes is not None, "an instruction corpus has modes"
        return which, np.maximum(labels, 0), modes[sequence] == 0
