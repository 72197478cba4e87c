"""A SentencePiece BPE model as Hugging Face's `tokenizer.json`.

That file has a list of merges where SentencePiece has scores.
"""

from typing import Any

from sentencepiece import sentencepiece_model_pb2

# The classes of a protobuf module are made at run time.
protocol: Any = sentencepiece_model_pb2
_Piece = protocol.ModelProto.SentencePiece
_SPACE = "\u2581"


def tokenizer_json(model: Any) -> dict[str, Any] | None:
    """Return the content of the `tokenizer.json` that gives the same ids.

    `transformers` makes such a list too, but in the order of the ids, which is not that of the
    scores where tokens were replaced.

    Two pieces merge where their text together is a piece, the one with the highest score first;
    SentencePiece takes the first in the text of equal scores, as runs of spaces have in LLaMA's
    models. The result is the same when the longest of them merges first: a run grows from its left
    end.

    Returns:
        None where the model normalizes text in a way that is not known here.
    """
    spec = model.normalizer_spec
    if (
        spec.precompiled_charsmap
        or spec.remove_extra_whitespaces
        or not spec.escape_whitespaces
        or model.trainer_spec.treat_whitespace_as_suffix
    ):
        return None
    normal = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == _Piece.NORMAL}
    ranked = sorted(
        normal, key=lambda text: (-model.pieces[normal[text]].score, -len(text), normal[text])
    )
    merges = [
        [text[:i], text[i:]]
        for text in ranked
        for i in range(len(text) - 1, 0, -1)
        if text[:i] in normal and text[i:] in normal
    ]
    added = [
        {
            "id": i,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        for i, piece in enumerate(model.pieces)
        if (special := piece.type in (_Piece.CONTROL, _Piece.UNKNOWN))
        or piece.type == _Piece.USER_DEFINED
    ]
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if spec.add_dummy_prefix else []
    strip = (
        [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spec.add_dummy_prefix else []
    )
    byte_fallback = model.trainer_spec.byte_fallback
    unknown = next(piece.piece for piece in model.pieces if piece.type == _Piece.UNKNOWN)
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        *([{"type": "ByteFallback"}] * byte_fallback),
        {"type": "Fuse"},
        *strip,
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *prefix,
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _begin(model),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
            "merges": merges,
        },
    }


def _begin(model: Any) -> dict[str, Any] | None:
    """Return the step that puts the begin token before a text, as LLaMA needs it.

    It applies where the caller asks for special tokens.
    """
    bos = model.trainer_spec.bos_id
    if bos < 0:
        return None
    name = model.pieces[bos].piece
    token = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = (
        {"Sequence": {"id": letter, "type_id": type_id}} for letter, type_id in (("A", 0), ("B", 1))
    )
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }
