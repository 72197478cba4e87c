"""Tokenizers that know English only, to be extended; and the sample corpora of the quickstart to
extend them with.
"""

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import sentencepiece
import tokenizers

from megatron_chatflow.tokenizer.extend import open_vocabulary
from megatron_chatflow.tokenizer.vocabulary_base import Vocabulary

DATA = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "data"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n"
    r"]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def documents(name: str) -> tuple[str, ...]:
    """The documents of a sample corpus."""
    return tuple(
        json.loads(line)["text"]
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    )


def corpus(*batches: Sequence[str]):
    """A corpus that can be read again and again."""
    return lambda: iter(batches)


@cache
def english_spm(vocab_size: int = 1000, **options) -> bytes:
    """A SentencePiece BPE model in LLaMA's manner."""
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 3,
        "num_threads": 1,
    }
    lines = (line for text in documents("en")[:150] for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, **defaults | options
    )
    return model.getvalue()


@cache
def english_bytes(
    vocab_size: int = 1000, pattern: str | None = None, ignore_merges: bool = False
) -> bytes:
    """A byte-level BPE in GPT-2's manner, or split by a pattern as LLaMA-3's; `<|endoftext|>`
    is after the vocabulary, as there.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    before = tokenizers.pre_tokenizers
    if pattern is None:
        backend.pre_tokenizer = before.ByteLevel(add_prefix_space=False)
    else:
        split = before.Split(tokenizers.Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = before.Sequence(
            [split, before.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=before.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(documents("en")[:150], trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    return backend.to_str().encode()


def write_base(folder: Path, kind: str) -> tuple[str, Path]:
    """Writes a tokenizer of a kind; returns Megatron's name for it and its file."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "sentencepiece":
        path = folder / "tokenizer.model"
        path.write_bytes(english_spm())
        return "SentencePieceTokenizer", path
    path = folder / "tokenizer.json"
    path.write_bytes(
        {"gpt2": english_bytes, "llama3": lambda: english_bytes(1000, LLAMA3, True)}[kind]()
    )
    return "HuggingFaceTokenizer", path


def open_base(folder: Path, kind: str) -> Vocabulary:
    """The vocabulary of a tokenizer of a kind."""
    tokenizer_type, path = write_base(folder, kind)
    return open_vocabulary(tokenizer_type, str(path))
