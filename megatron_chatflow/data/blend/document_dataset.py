"""Complete documents of text files as windows for evaluation: the same text for any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_chatflow.data.blend.batch import Batch, empty_batch
from megatron_chatflow.data.blend.packing import pack
from megatron_chatflow.tokenizer import Tokenizer


class DocumentDataset:
    """Separate documents, packed into windows of S positions.

    Every token of every document is a label exactly once. A document begins after a token `start`,
    which predicts its first one, and what is longer than S continues in another window, whose first
    input is the last label before: no label is left out, and none is predicted from more than S
    tokens. Attention and positions are confined to one piece of a document.

    Args:
        texts: the documents.
        tokenizer: of the model.
        start: token before each document (end-of-document or begin).
        seq_length: S.

    Attributes:
        num_samples: windows.
        num_documents: documents.
        bytes: UTF-8 bytes of the documents as given, whatever the tokenizer makes of them.
        num_changed: documents that the tokenizer does not decode to the same text (characters it
            normalizes or does not know).
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, *, start: int, seq_length: int
    ) -> None:
        self.seq_length = seq_length
        self.num_documents = len(texts)
        self.bytes = sum(len(text.encode()) for text in texts)
        encoded = tokenizer.encode_batch(texts, num_threads=2)
        self.num_changed = sum(
            tokenizer.decode(ids) != text for ids, text in zip(encoded, texts, strict=True)
        )
        streams = [[start, *ids] for ids in encoded]
        self._pieces = [
            np.array(s[at : at + seq_length + 1], np.int64)
            for s in streams
            for at in range(0, len(s) - 1, seq_length)
        ]
        self._packing = pack(np.array([len(piece) for piece in self._pieces], np.int64), seq_length)
        self.num_samples = self._packing.num_windows

    def read_window(self, windows: np.ndarray) -> Batch:
        """Read windows by number, int64 [n]; `empty_batch` describes the result.

        The rest of a window is padding without loss.
        """
        batch = empty_batch(len(windows), self.seq_length)
        for name in ("tokens", "labels", "loss_mask"):
            batch[name].fill(0)
        for row, window in enumerate(windows.tolist()):
            at = segment = 0
            for piece in self._packing.order[
                slice(*self._packing.starts[window : window + 2])
            ].tolist():
                tokens = self._pieces[piece]
                here = slice(at, at := at + len(tokens) - 1)
                batch["tokens"][row, here] = tokens[:-1]
                batch["labels"][row, here] = tokens[1:]
                batch["loss_mask"][row, here] = 1
                batch["position_ids"][row, here] = np.arange(len(tokens) - 1)
                batch["segment_ids"][row, here] = segment
                segment += 1
            batch["position_ids"][row, at:] = np.arange(self.seq_length - at)
            batch["segment_ids"][row, at:] = segment
        return batch
