"""tools/verify_dataset.py as a program."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_chatflow.data import IndexedDatasetBuilder, Manifest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "verify_dataset.py"


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


@pytest.fixture
def corpus(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "a", np.uint16) as builder:
        builder.add_document(np.arange(1000), [400, 600])
        builder.finalize(
            Manifest(
                tokenizer={"type": "t", "name": "n", "hash": "h", "vocab_size": 1000, "eod": 0},
                dtype="uint16",
                documents=1,
                tokens=1000,
                bytes=1,
                sources=[],
                append_eod=False,
                conversations=False,
            )
        )
    return tmp_path / "a"


def flip(path, offset, bits=1):
    content = bytearray(path.read_bytes())
    content[offset] ^= bits
    path.write_bytes(content)


def test_a_valid_corpus_is_exit_code_0(corpus):
    result = run(corpus, corpus)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [f"corpus {corpus}: valid, 1 documents, 1,000 tokens"] * 2


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda corpus: flip(corpus.with_suffix(".bin"), 100),
            "the .bin is not the one that a.json was written with",
        ),
        (
            lambda corpus: flip(corpus.with_suffix(".bin"), 101, 0x80),
            "is 32818, outside the vocabulary of 1000",
        ),
        (
            lambda corpus: flip(corpus.with_suffix(".idx"), 34),
            "sequence 1 does not start where the one before it ends",
        ),
        (lambda corpus: os.truncate(corpus.with_suffix(".bin"), 1998), "truncated"),
        (lambda corpus: corpus.with_suffix(".bin").unlink(), "a.bin does not exist"),
        (lambda corpus: os.truncate(corpus.with_suffix(".json"), 9), "is not JSON"),
    ],
)
def test_an_invalid_corpus_is_exit_code_1_with_the_reason(corpus, damage, named):
    damage(corpus)
    result = run(corpus)
    assert result.returncode == 1 and named in result.stdout and "valid," not in result.stdout


def test_every_corpus_is_checked_also_after_an_invalid_one(corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"b{suffix}").write_bytes(corpus.with_suffix(suffix).read_bytes())
    flip(tmp_path / "a.bin", 0)
    result = run(tmp_path / "a", tmp_path / "b")
    assert result.returncode == 1 and f"corpus {tmp_path / 'b'}: valid" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "PREFIX"),
        (["nothing"], "nothing.bin and nothing.idx do not exist"),
        (["{}.idx"], "write {}\n"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(corpus, arguments, named):
    result = run(*(argument.format(corpus) for argument in arguments))
    assert result.returncode == 2 and named.format(corpus) in result.stderr
