"""Small tokenizers of every kind, trained on the first article of the Universal Declaration of
Human Rights.
"""

import base64
import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

LINES = (
    (
        "All human beings are born free and equal in dignity and rights. They are endowed with "
        "reason and conscience"
    ),
    "and should act towards one another in a spirit of brotherhood.",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    (
        "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, "
        "ésszel és lelkiismerettel bírván,"
    ),
    "egymással szemben testvéri szellemben kell hogy viseltessenek.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
)
ODD = (
    "",
    " ",
    "  two  spaces \t tab\r\nline\n\n",
    "👩‍👩‍👧‍👦 🇭🇺 e\u0301 \ufb01 \u2581 \u00a0 \u3000 \x00 \ufeff \ufffd \U0010ffff",
    "</s><s><unk><pad><eod><|endoftext|><|im_start|>user<|im_end|><0x41>",
)
TEXTS = LINES + ODD

texts = st.lists(
    st.sampled_from(TEXTS) | st.text(max_size=20) | st.text("ab <|/s>\u2581人é", max_size=10),
    max_size=6,
).map("".join)
"""Texts of many languages and odd characters; any text that can be written as UTF-8."""


def sentencepiece_model(**options) -> bytes:
    """Trains a model on `LINES`."""
    model = io.BytesIO()
    defaults = {
        "vocab_size": 400,
        "model_type": "bpe",
        "minloglevel": 3,
        "num_threads": 1,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, **defaults | options
    )
    return model.getvalue()


def without_space(model: bytes) -> bytes:
    """A SentencePiece model whose space has no separate piece any more, but is in other
    pieces.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    (space,) = [piece for piece in proto.pieces if piece.piece == "\u2581"]
    space.type = space.UNUSED
    return proto.SerializeToString()


def byte_level_bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE as GPT-2's, with 256 bytes and 200 merges; no special tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=456, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES * 3, trainer)
    return backend


def metaspace_bpe() -> tokenizers.Tokenizer:
    """A BPE with U+2581 for spaces and byte pieces for what it does not know, as LLaMA's
    tokenizer.json.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special + pieces, show_progress=False
    )
    backend.train_from_iterator([" ".join(LINES[:5])], trainer)
    description = json.loads(backend.to_str())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["content"] in special
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def byte_ranks(backend: tokenizers.Tokenizer) -> dict[bytes, int]:
    """The vocabulary of a byte-level BPE as real bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
    return {bytes(byte_of[char] for char in token): i for token, i in backend.get_vocab().items()}


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> Path:
    """Writes Megatron's JSON list of tokens."""
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode()}
        for i, token in enumerate(sorted(ranks, key=ranks.get))
    ]
    path.write_text(json.dumps(entries))
    return path


def write_sentencepiece(path: Path, **options) -> Path:
    """Trains a model on `LINES` and writes it."""
    path.write_bytes(sentencepiece_model(**options))
    return path
