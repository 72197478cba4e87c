#!/usr/bin/env python3
"""Train the sample tokenizer, tokenizer.model, on the sample corpora in data/.

    python build_tokenizer.py            # write tokenizer.model
    python build_tokenizer.py --check    # train again and compare, byte for byte

A SentencePiece BPE model in LLaMA's manner: text is taken as it is, digits stand alone, what has no
piece is spelled in bytes, and the ids 0, 1 and 2 are the unknown, beginning-of-text and end-of-text
tokens. One thread and no sampling, so the same text and the same release of SentencePiece give the
same bytes.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096


def lines() -> Iterator[str]:
    """Every line of text of the four corpora, in the order of the files."""
    for path in sorted((HERE / "data").glob("*.jsonl")):
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            turns = [turn["content"] for turn in record.get("messages", [])]
            texts = [
                record.get(key, "") for key in ("text", "en", "zh", "instruction", "output")
            ] + turns
            for text in texts:
                yield from filter(None, text.split("\n"))


def train() -> bytes:
    """The serialized model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with tokenizer.model instead of writing it; exit code 1 if a byte differs",
    )
    arguments = parser.parse_args()
    model, path = train(), HERE / "tokenizer.model"
    same = path.exists() and path.read_bytes() == model
    print(
        f"{path.name}: {VOCAB_SIZE} pieces, {len(model)} bytes, "
        f"{'as' if same else 'other than'} before"
    )
    if not arguments.check:
        path.write_bytes(model)
    return int(arguments.check and not same)


if __name__ == "__main__":
    sys.exit(main())
