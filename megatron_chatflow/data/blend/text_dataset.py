"""Text domains: fixed windows over the token stream."""

from functools import cached_property

import numpy as np

from megatron_chatflow.data.blend.batch import Batch, concatenated_ranges, segments_of
from megatron_chatflow.data.blend.window_dataset import WindowDataset, WindowOptions
from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.errors import DataError


class TextDataset(WindowDataset):
    """The documents of a text corpus, one after the other, cut into windows of S positions.

    Window w holds the tokens w*S .. (w+1)*S of the stream, and the labels are the next tokens. So
    every token but the stream's first is a label exactly once per epoch. The last window may be
    short; it is padded with token 0, loss_mask 0 and a separate segment. Nothing is built: a
    window's place in the file is arithmetic, and document boundaries, where they are needed, are
    found by bisection in the mapped index.

    Args:
        name, dataset, documents, options: as in `WindowDataset`.

    Raises:
        DataError: the sequences are not stored in order, or `eod_mask_loss` without `eod`.
    """

    def __init__(
        self,
        name: str,
        dataset: IndexedDataset,
        documents: tuple[int, int],
        options: WindowOptions,
    ) -> None:
        super().__init__(name, dataset, documents, options)
        if options.eod_mask_loss and options.eod is None:
            raise DataError(
                "eod_mask_loss is set, but the end-of-document token is unknown: pass eod, "
                "or leave eod_mask_loss off"
            )
        self.reset_position_ids = options.reset_position_ids
        self.reset_attention_mask = options.reset_attention_mask
        self.masked_token = options.eod if options.eod_mask_loss else None
        self.begin, self.end = dataset.token_range(*documents)
        labels = self.end - self.begin - 1
        self.num_samples = max(0, -(-labels // self.seq_length))
        self.last_length = (
            labels - (self.num_samples - 1) * self.seq_length if self.num_samples else 0
        )

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_texts"}

    @cached_property
    def _texts(self) -> np.ndarray:
        """Every run of S + 1 tokens of the stream, [tokens - S, S + 1], as a view."""
        stream = self.dataset.tokens[self.begin : self.end]
        return np.lib.stride_tricks.sliding_window_view(stream, self.seq_length + 1)

    def fill_chunk(self, batch: Batch, rows: np.ndarray, windows: np.ndarray) -> None:
        """See `WindowDataset.fill_chunk`."""
        short = (
            windows == self.num_samples - 1
            if self.last_length < self.seq_length
            else np.zeros(len(windows), bool)
        )
        text = (
            self._gather(windows, short) if short.any() else self._texts[windows * self.seq_length]
        )
        batch["tokens"][rows] = text[:, :-1]
        batch["labels"][rows] = text[:, 1:]
        if self.masked_token is not None:
            batch["loss_mask"][rows] = text[:, :-1] != self.masked_token
        if self.reset_position_ids or self.reset_attention_mask:
            segment_ids, position_ids = segments_of(
                self._document_starts(windows), len(windows), self.seq_length
            )
            if self.reset_attention_mask:
                batch["segment_ids"][rows] = segment_ids
            if self.reset_position_ids:
                batch["position_ids"][rows] = position_ids
        for row in rows[short].tolist():
            stop = self.last_length
            for key in ("tokens", "labels", "loss_mask"):
                batch[key][row, stop:] = 0
            batch["segment_ids"][row, stop:] = batch["segment_ids"][row, stop - 1] + 1
            if self.reset_position_ids:
                batch["position_ids"][row, stop:] = np.arange(self.seq_length - stop)

    def window_documents(self, window: int) -> list[tuple[int, int, int]]:
        """See `WindowDataset.window_documents`: the S + 1 tokens that are input or label.

        Takes O(log documents).
        """
        start = self.begin + window * self.seq_length
        stop = min(start + self.seq_length + 1, self.end)
        first, last = self.dataset.documents_at(np.array([start, stop - 1])).tolist()
        bounds = self.dataset.document_starts(np.arange(first, last + 2)).tolist()
        spans = zip(range(first, last + 1), bounds[:-1], bounds[1:], strict=True)
        return [
            (document, max(start, a) - a, min(stop, b) - a)
            for document, a, b in spans
            if max(start, a) < min(stop, b)
        ]

    def _gather(self, windows: np.ndarray, short: np.ndarray) -> np.ndarray:
        text = np.zeros((len(windows), self.seq_length + 1), self.dataset.dtype)
        if not short.all():
            text[~short] = self._texts[windows[~short] * self.seq_length]
        text[short, : self.last_length + 1] = self.dataset.tokens[
            self.end - self.last_length - 1 : self.end
        ]
        return text

    def _document_starts(self, windows: np.ndarray) -> np.ndarray:
        """Return where in the windows a document starts, as `segments_of` takes it.

        The windows' own starts are left out.
        """
        start = self.begin + windows * self.seq_length
        stop = np.minimum(start + self.seq_length, self.end)
        first, last = self.dataset.documents_at(np.concatenate([start, stop - 1])).reshape(2, -1)
        window, within = concatenated_ranges(np.maximum(last - first, 0))
        column = self.dataset.document_starts(first[window] + 1 + within) - start[window]
        if np.any(last < first) or np.any((column < 1) | (column >= self.seq_length)):
            prefix = self.dataset.prefix
            raise DataError(
                f"corpus {prefix}: the documents in {prefix}.idx do not follow one another: "
                f"see what tools/verify_dataset.py says"
            )
        return window * self.seq_length + column
