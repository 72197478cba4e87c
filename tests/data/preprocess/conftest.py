"""A small tokenizer, and a function that runs `preprocess` on given files."""

import io
import json

import pytest
import sentencepiece

from megatron_chatflow.data.preprocess.options import PreprocessOptions
from megatron_chatflow.data.preprocess.pipeline import preprocess
from tests.data.preprocess.samples import TEXTS


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    content = io.BytesIO()
    options = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 3,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=content, **options
    )
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(content.getvalue())
    return path


@pytest.fixture
def run(tmp_path):
    """A function: files (name -> bytes, or records that become JSON lines) and settings -> summary;
    bytes by default.
    """

    def go(files, **options):
        for name, content in files.items():
            lines = (
                content
                if isinstance(content, bytes)
                else "".join(
                    json.dumps(record, ensure_ascii=False) + "\n" for record in content
                ).encode()
            )
            (tmp_path / name).write_bytes(lines)
        options = {
            "tokenizer_type": "ByteLevelTokenizer",
            "input": tuple(str(tmp_path / name) for name in files),
        } | options
        return preprocess(PreprocessOptions(output_prefix=str(tmp_path / "out" / "x"), **options))

    go.folder = tmp_path / "out"
    return go
