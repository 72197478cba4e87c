"""Small tokenizers of every kind."""

import json

import pytest
from hypothesis import settings

from tests.tokenizer import samples

settings.register_profile("derandomized", derandomize=True, deadline=None)
settings.load_profile("derandomized")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a file of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    plain = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
    }
    samples.write_sentencepiece(folder / "bytes.model", vocab_size=500, byte_fallback=True, **plain)
    samples.write_sentencepiece(
        folder / "unigram.model", model_type="unigram", normalization_rule_name="nmt_nfkc"
    )
    marks = ["<|im_start|>", "<|im_end|>"]
    samples.write_sentencepiece(
        folder / "chat.model",
        vocab_size=500,
        byte_fallback=True,
        user_defined_symbols=marks,
        **plain,
    )
    backend = samples.byte_level_bpe()
    backend.model.save(str(folder), "gpt2")
    vocab = json.loads((folder / "gpt2-vocab.json").read_text())
    (folder / "gpt2-vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
    samples.write_tiktoken(folder / "tiktoken.json", samples.byte_ranks(backend))
    backend.add_special_tokens(["<|endoftext|>", *marks])
    backend.add_tokens(["freedom人"])
    backend.enable_truncation(5)
    backend.enable_padding(length=7)
    (folder / "byte_level").mkdir()
    backend.save(str(folder / "byte_level" / "tokenizer.json"))
    (folder / "metaspace").mkdir()
    samples.metaspace_bpe().save(str(folder / "metaspace" / "tokenizer.json"))
    return folder
