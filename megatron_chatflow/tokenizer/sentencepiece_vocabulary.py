"""SentencePiece BPE models, read and written as protocol buffers."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.errors import TokenizerError
from megatron_chatflow.tokenizer.merge_candidates import (
    UNKNOWN_CHARACTER,
    SymbolText,
    TargetCharacters,
)
from megatron_chatflow.tokenizer.sentencepiece_to_hf import tokenizer_json
from megatron_chatflow.tokenizer.unicode_scripts import ZERO_WIDTH, only_marks
from megatron_chatflow.tokenizer.vocabulary_base import (
    NewToken,
    Vocabulary,
    copy_companions,
    last_merge,
    write_json,
)

# The classes of a protobuf module are made at run time.
protocol: Any = sentencepiece_model_pb2
_Piece = protocol.ModelProto.SentencePiece
_LONGEST = 16
"""Characters of a new token, as in SentencePiece's training."""


class SentencePieceVocabulary(Vocabulary):
    """The pieces of a SentencePiece BPE model.

    Two pieces merge when their text together is a piece, the one with the highest score first. New
    pieces get scores below all others, so they merge only when nothing else does.

    Args:
        type: Megatron's name.
        path: the file, for messages.
        content: the `.model` file.

    Raises:
        TokenizerError: it is not a BPE model.
    """

    def __init__(self, type: str, path: str, content: bytes) -> None:
        self.type = type
        self.content = content
        self._path = path
        self._model = protocol.ModelProto()
        self._model.ParseFromString(content)
        trained_as = self._model.trainer_spec.model_type
        if trained_as != protocol.TrainerSpec.BPE:
            name = protocol.TrainerSpec.ModelType.Name(trained_as).lower()
            raise TokenizerError(
                f"{path} is a SentencePiece model of type {name}, whose pieces do not come "
                f"from merges that could be continued: "
                "give one trained with --model_type=bpe, as LLaMA's and Mistral's are"
            )
        pieces = self._model.pieces
        self.size = len(pieces)
        self._normal = np.array([piece.type == _Piece.NORMAL for piece in pieces])
        self._user_defined = np.array([piece.type == _Piece.USER_DEFINED for piece in pieces])
        self.text = SymbolText({i: _text_of(piece) for i, piece in enumerate(pieces)})
        # Without bytes to spell it with, a character that has no piece any more would be lost.
        single = [
            len(piece.piece if not self._model.trainer_spec.byte_fallback else piece.piece.encode())
            == 1
            for piece in pieces
        ]
        self.fixed = (
            ~self._normal
            | np.array(single)
            | np.array([piece.piece == "\u2581" for piece in pieces])
        )
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=_with_bytes(self._model).SerializeToString()
        )
        self._bare = sentencepiece.SentencePieceProcessor(
            model_proto=_bare(self._model).SerializeToString()
        )
        self._byte = np.array(
            [
                self._processor.IdToPiece(i)[3:5] if self._processor.IsByte(i) else "100"
                for i in range(self._processor.GetPieceSize())
            ]
        )
        self._byte = np.array([int(code, 16) for code in self._byte])

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Vocabulary.encode`."""
        encoded = self._processor.encode(list(texts), num_threads=len(os.sched_getaffinity(0)))
        ids = np.concatenate(
            [np.array(document, np.int32) for document in encoded] or [np.zeros(0, np.int32)]
        )
        ends = np.zeros(len(ids), bool)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ends[np.cumsum(lengths)[lengths > 0] - 1] = True
        ids, ends = _characters(ids, ends, self._byte[ids])
        frozen = np.zeros(len(ids), bool)
        pieces = ids < self.size
        frozen[pieces] = self._user_defined[ids[pieces]]
        return ids, ends | frozen | np.append(frozen[1:], False)

    def split(self, texts: Sequence[bytes]) -> list[list[int]]:
        """See `Vocabulary.split`."""
        return self._bare.encode([text.decode() for text in texts])

    def parts(self) -> list[tuple[int, ...]]:
        """See `Vocabulary.parts`."""
        ids = {piece.piece: i for i, piece in enumerate(self._model.pieces) if self._normal[i]}
        scores = {
            piece.piece: -piece.score for piece in self._model.pieces if piece.type == _Piece.NORMAL
        }

        def rank(left: str, right: str) -> float | None:
            return scores.get(left + right)

        result: list[tuple[int, ...]] = [()] * self.size
        for text, i in ids.items():
            result[i] = tuple(ids[part] for part in last_merge(list(text), rank) if part in ids)
        return result

    def may_be_added(self, target: TargetCharacters) -> Callable[[bytes], bool]:
        """See `Vocabulary.may_be_added`."""
        taken = {piece.piece for piece in self._model.pieces}
        normal = np.flatnonzero(self._normal).tolist()
        dead = [self.text[i].decode() for i in self.unreachable(normal)]
        woken = {
            text[i:j]
            for text in dead
            for i in range(len(text))
            for j in range(i + 1, len(text) + 1)
        }

        def allowed(text: bytes) -> bool:
            piece = text.decode()
            # Without a piece for the zero-width joiners no piece could reach across them.
            if target.other_script and piece not in ZERO_WIDTH and only_marks(piece):
                return False
            return len(piece) <= _LONGEST and piece not in taken and piece not in woken

        return allowed

    def changed(self, removed: Iterable[int], new: Sequence[NewToken]) -> "SentencePieceVocabulary":
        """See `Vocabulary.changed`."""
        model = protocol.ModelProto()
        model.CopyFrom(self._model)
        score = np.float32(min(piece.score for piece in model.pieces))
        for i in removed:
            # Three or more characters of which no two neighbors are a piece: never found in a
            # text.
            model.pieces[i].piece = f"\U0010fffd{i}\U0010fffd"
            model.pieces[i].score = score = _below(score)
        for token in new:
            piece = model.pieces[token.id] if token.id < self.size else model.pieces.add()
            piece.piece = token.text.decode()
            piece.score = score = _below(score)
            piece.type = _Piece.NORMAL
        model.trainer_spec.vocab_size = len(model.pieces)
        return SentencePieceVocabulary(
            self.type, self._path, model.SerializeToString(deterministic=True)
        )

    def lost(self, texts: Sequence[str], symbols: np.ndarray) -> set[str]:
        """See `Vocabulary.lost`."""
        if self._model.trainer_spec.byte_fallback:
            return set()
        return {
            chr(symbol - UNKNOWN_CHARACTER)
            for symbol in np.unique(symbols[symbols >= UNKNOWN_CHARACTER]).tolist()
        }

    def save(self, folder: str, source: str) -> list[str]:
        """See `Vocabulary.save`."""
        with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
            file.write(self.content)
        written = ["tokenizer.model"]
        if (fast := tokenizer_json(self._model)) is not None:
            write_json(os.path.join(folder, "tokenizer.json"), fast)
            written.append("tokenizer.json")
        copied = copy_companions(source, folder)
        if "tokenizer_config.json" not in copied:
            spec = self._model.trainer_spec
            names = {
                "bos_token": spec.bos_id,
                "eos_token": spec.eos_id,
                "unk_token": spec.unk_id,
                "pad_token": spec.pad_id,
            }
            config = {role: self._model.pieces[i].piece for role, i in names.items() if i >= 0}
            # The first takes the tokenizer.json unchanged; the other one makes another from
            # tokenizer.model.
            config["tokenizer_class"] = (
                "PreTrainedTokenizerFast" if fast is not None else "LlamaTokenizer"
            )
            write_json(os.path.join(folder, "tokenizer_config.json"), config)
            written.append("tokenizer_config.json")
        return [*written, *copied]


def _text_of(piece: Any) -> bytes:
    if piece.type == _Piece.BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    return b"" if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN) else piece.piece.encode()


def _with_bytes(model: Any) -> Any:
    """Return the model, made to spell what it does not know in bytes.

    The bytes follow the last id where the model has none.
    """
    if model.trainer_spec.byte_fallback:
        return model
    result = protocol.ModelProto()
    result.CopyFrom(model)
    result.trainer_spec.byte_fallback = True
    for byte in range(256):
        result.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=_Piece.BYTE)
    return result


def _bare(model: Any) -> Any:
    """Return the model without a space before the text and without normalization."""
    result = protocol.ModelProto()
    result.CopyFrom(model)
    spec = result.normalizer_spec
    spec.name, spec.precompiled_charsmap = "identity", b""
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    spec.escape_whitespaces = True
    return result


def _characters(
    ids: np.ndarray, ends: np.ndarray, byte: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put the symbol of a character where its bytes are spelled: int32 and bool [m].

    `byte` is 256 for tokens that are not bytes.
    """
    lead = (byte < 0x80) | ((byte >= 0xC0) & (byte < 0x100))
    at = np.flatnonzero(lead)
    first = byte[at]
    width = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
    codepoint = np.where(width == 1, first, first & np.choose(width - 1, [0xFF, 0x1F, 0x0F, 0x07]))
    padded = np.append(byte, [0, 0, 0])
    for offset in (1, 2, 3):
        more = width > offset
        codepoint[more] = codepoint[more] << 6 | (padded[at[more] + offset] & 0x3F)
    symbols = ids.copy()
    symbols[at] = UNKNOWN_CHARACTER + codepoint
    ends[at] = ends[at + width - 1]
    kept = lead | (byte == 256)
    return symbols[kept], ends[kept]


def _below(score: np.float32) -> np.float32:
    """Return the next integer below a score, or the next float32 where there is none."""
    lower = np.float32(score - np.float32(1))
    return lower if lower < score else np.nextafter(score, np.float32(-np.inf))
