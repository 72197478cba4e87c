"""Megatron's `.bin/.idx` in numpy: writing (the layout is described in `indexed.py`)."""

import os
import shutil
from array import array
from collections.abc import Sequence

import numpy as np

from megatron_chatflow.data.indexed import CODES, HEADER, MAGIC, VERSION, IndexedDataset
from megatron_chatflow.data.manifest import Manifest, manifest_path, write_manifest

Numbers = Sequence[int] | np.ndarray
_CHUNK = 1 << 20


class IndexedDatasetBuilder:
    """Writes a corpus: documents in, `.bin` and `.idx` out.

    Everything is written under temporary names beside the target; `finalize` brings it to the disk and renames it, the `.idx` last:
    a corpus that has an `.idx` is whole. Leaving the `with` block without `finalize` removes what was written. In memory are
    4 bytes a sequence and 8 a document.

        with IndexedDatasetBuilder(prefix, best_dtype(vocab_size)) as builder:
            builder.add_document(tokens, [len(tokens)])
            builder.finalize()

    Args:
        prefix: path of the corpus without `.bin` and `.idx`; its folder must exist.
        dtype: type of a token in the file, e.g. `best_dtype(vocab_size)`.
        multimodal: whether each sequence has a mode (conversations: 1 prompt, 0 answer).

    Raises:
        ValueError: the dtype is none of the format's integer types.
    """

    def __init__(self, prefix: str | os.PathLike, dtype: np.typing.DTypeLike, multimodal: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"dtype {self.dtype.name} cannot hold tokens in a .bin: use one of {sorted(d.name for d in CODES)}")
        self.multimodal = multimodal
        self.num_tokens = 0
        self._limits = np.iinfo(self.dtype)
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._modes = array("b")
        self._temporary = {suffix: f"{self.prefix}{suffix}.{os.getpid()}.tmp" for suffix in (".bin", ".idx")}
        self._bin = open(self._temporary[".bin"], "wb", buffering=_CHUNK)  # noqa: SIM115 (closed by finalize or abort)

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._documents) - 1

    @property
    def num_sequences(self) -> int:
        """Sequences added so far."""
        return len(self._lengths)

    def add_document(self, tokens: Numbers, lengths: Numbers, modes: Numbers | None = None) -> None:
        """Adds a document.

        Args:
            tokens: the tokens of all its sequences [n]; may be empty.
            lengths: tokens of each sequence; they add up to n. An empty list is a document without sequences.
            modes: mode of each sequence; only in a multimodal corpus, where it defaults to 0.

        Raises:
            ValueError: a token does not fit the dtype, the lengths do not add up, or the modes do not match them.
        """
        tokens = np.asarray(tokens)
        if tokens.size:
            if tokens.dtype.kind not in "iu":
                raise ValueError(f"{self.prefix}: tokens are {tokens.dtype.name}, whole numbers are expected")
            low, high = int(tokens.min()), int(tokens.max())
            if low < self._limits.min or high > self._limits.max:
                raise ValueError(
                    f"{self.prefix}: token {high if high > self._limits.max else low} does not fit {self.dtype.name}: "
                    "build with best_dtype(vocab_size) of the tokenizer that was used"
                )
        if sum(lengths) != tokens.size or (len(lengths) and min(lengths) < 0):
            raise ValueError(f"{self.prefix}: the sequence lengths add up to {sum(lengths)}, the document has {tokens.size} tokens")
        if modes is not None and (not self.multimodal or len(modes) != len(lengths)):
            raise ValueError(f"{self.prefix}: {len(modes)} modes for {len(lengths)} sequences (a corpus with modes is built with multimodal=True)")
        self._bin.write(tokens.astype(self.dtype.newbyteorder("<"), copy=False).tobytes())
        self.num_tokens += int(tokens.size)
        self._lengths.extend(int(n) for n in lengths)
        self._documents.append(len(self._lengths))
        if self.multimodal:
            self._modes.extend([0] * len(lengths) if modes is None else (int(m) for m in modes))

    def add_index(self, prefix: str | os.PathLike) -> None:
        """Adds all documents of another corpus.

        Raises:
            ValueError: it has another dtype, only one of the two has modes, or its sequences are not stored in order.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise ValueError(f"{self.prefix}: {other.prefix} has tokens of {other.dtype.name}, not {self.dtype.name}: preprocess it again alike")
        if other.num_sequences and (other.sequence_modes is not None) != self.multimodal:
            has = "lacks" if self.multimodal else "has"
            raise ValueError(f"{self.prefix}: {other.prefix} {has} sequence modes: conversations and text cannot be merged")
        if not other.header.contiguous:
            raise ValueError(f"{self.prefix}: the sequences of {other.prefix} are not stored in order: add it document by document")
        offset = len(self._lengths)
        with open(other.prefix + ".bin", "rb") as file:
            shutil.copyfileobj(file, self._bin, _CHUNK)
        self.num_tokens += other.num_tokens
        self._lengths.frombytes(other.sequence_lengths.astype("i").tobytes())
        self._documents.frombytes((other.document_indices[1:] + offset).astype("q").tobytes())
        if self.multimodal and other.sequence_modes is not None:
            self._modes.frombytes(other.sequence_modes.tobytes())

    def finalize(self, manifest: Manifest | None = None) -> None:
        """Writes the index and gives the files their names, `.idx` last; what an older corpus of this name left is removed before.

        Args:
            manifest: written as `<prefix>.json` before the `.idx` appears.
        """
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        with open(self._temporary[".idx"], "wb") as file:
            self._write_index(file)
            file.flush()
            os.fsync(file.fileno())
        for stale in (self.prefix + ".idx", manifest_path(self.prefix)):
            if os.path.exists(stale):
                os.unlink(stale)
        os.replace(self._temporary[".bin"], self.prefix + ".bin")
        if manifest is not None:
            write_manifest(self.prefix, manifest)
        os.replace(self._temporary[".idx"], self.prefix + ".idx")
        folder = os.open(os.path.dirname(self.prefix) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def abort(self) -> None:
        """Closes and removes the temporary files; nothing is left to remove after `finalize`."""
        self._bin.close()
        for path in self._temporary.values():
            if os.path.exists(path):
                os.unlink(path)

    def _write_index(self, file) -> None:
        lengths = np.frombuffer(self._lengths, np.int32)
        file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(self._documents)))
        file.write(lengths.astype("<i4", copy=False).data)
        start = 0
        for chunk in range(0, len(lengths), _CHUNK):
            ends = np.cumsum(lengths[chunk : chunk + _CHUNK], dtype=np.int64) * self.dtype.itemsize + start
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").data)
            start = int(ends[-1])
        file.write(np.frombuffer(self._documents, np.int64).astype("<i8", copy=False).data)
        file.write(self._modes.tobytes())
