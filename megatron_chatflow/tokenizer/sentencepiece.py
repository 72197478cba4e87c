"""SentencePiece models, by the `sentencepiece` library."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import sentencepiece

from megatron_chatflow.errors import TokenizerError
from megatron_chatflow.tokenizer.base import BYTE_SPACE, Tokenizer, digest, neighbors, read_bytes
from megatron_chatflow.tokenizer.unicode_scripts import SPACE


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    The end of a document is `<eod>` (or `<EOD>`) if the model has it, else the model's eos; for
    GPTSentencePieceTokenizer and Llama2Tokenizer it is always the eos, as in Megatron. Unlike the
    Llama2Tokenizer of old Megatron, none puts a begin token before a text.

    Symbols that the model's maker declared as user-defined are found in text by the library itself;
    control symbols never are.

    Args:
        type: one of Megatron's three names.
        path: the `.model` file.

    Raises:
        TokenizerError: the file cannot be read, is not a SentencePiece model, or has no end token.
    """

    def __init__(self, type: str, path: str) -> None:
        content = read_bytes(type, "tokenizer_model", path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
            size = self._model.GetPieceSize()
        except Exception as error:  # the library raises a different class in each release
            raise TokenizerError(
                f"{type}: tokenizer_model {path} is not a SentencePiece model: give the "
                f".model file, or HuggingFaceTokenizer for a tokenizer.json"
            ) from error
        eod = None
        if type == "SentencePieceTokenizer":
            eod = next((i for i in map(self._id, ("<eod>", "<EOD>")) if i is not None), None)
        if eod is None:
            eod = _or_none(self._model.eos_id())
        if eod is None:
            raise TokenizerError(
                f"{type}: {path} has neither <eod> nor an eos token to end documents with: "
                f"train it with an eos_id or the symbol <eod>"
            )
        super().__init__(
            type=type,
            name=os.path.basename(path),
            vocab_size=size,
            eod=eod,
            bos=_or_none(self._model.bos_id()),
            pad=_or_none(self._model.pad_id()),
            fingerprint=digest("sentencepiece", content, eod),
        )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return self._model.encode(list(texts), num_threads=num_threads)

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        return np.array([self._bytes_of(i) for i in range(self.vocab_size)], np.int32)

    def byte_space(self) -> tuple[int, int, int] | None:
        """See `Tokenizer.byte_space`."""
        space = self._id(SPACE)
        if space is not None and not self._model.IsUnused(space):
            return None
        first, second, third = map(self._id, BYTE_SPACE)
        return None if first is None or second is None or third is None else (first, second, third)

    def control_id(self, spelling: str) -> int | None:
        """See `Tokenizer.control_id`."""
        return self._id(spelling)

    def joins(self, before: str, after: str) -> bool:
        """Return whether a piece holds the two characters, as the model's normalizer leaves them.

        Unigram models are joined anywhere: their scores are summed up in float32 over the text, so
        that rounding decides about tokens at the end of a long one.
        """
        if self._joined is None:
            return True
        first, second = self._normalized(before)[-1:], self._normalized(after)[:1]
        return any(a + b in self._joined for a in (before, first) for b in (after, second))

    def _normalized(self, character: str) -> str:
        return SPACE if character.isspace() else self._model.Normalize(character).strip(SPACE)

    @cached_property
    def _joined(self) -> frozenset[str] | None:
        from sentencepiece import sentencepiece_model_pb2

        protocol: Any = sentencepiece_model_pb2  # its classes are made at run time
        model = protocol.ModelProto.FromString(self._model.serialized_model_proto())
        bpe = model.trainer_spec.model_type == protocol.TrainerSpec.BPE
        return neighbors(piece.piece for piece in model.pieces) if bpe else None

    def _bytes_of(self, token: int) -> int:
        if self._model.IsByte(token):
            return 1
        if (
            token == self.eod
            or self._model.IsControl(token)
            or self._model.IsUnknown(token)
            or self._model.IsUnused(token)
        ):
            return 0
        return len(self._model.IdToPiece(token).replace(SPACE, " ").encode())

    def _id(self, piece: str) -> int | None:
        token = self._model.PieceToId(piece)
        return token if self._model.IdToPiece(token) == piece else None

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def _or_none(token: int) -> int | None:
    return None if token < 0 else token
