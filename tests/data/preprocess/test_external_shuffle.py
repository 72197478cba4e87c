"""Documents in a random order."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from megatron_chatflow.data import IndexedDataset
from megatron_chatflow.data.corpus.verify import verify
from megatron_chatflow.data.preprocess import external_shuffle as module
from megatron_chatflow.data.preprocess.encoder import EncodedDocuments
from megatron_chatflow.data.preprocess.external_shuffle import shuffle
from megatron_chatflow.data.preprocess.options import PreprocessOptions
from megatron_chatflow.data.preprocess.pipeline import preprocess
from megatron_chatflow.data.preprocess.token_files import TokenFiles


def spool_of(path, documents, conversations):
    """A spool with these documents: lists of (tokens, mode)."""
    sequences = list(itertools.chain.from_iterable(documents))
    corpus = EncodedDocuments(
        np.array(list(itertools.chain.from_iterable(tokens for tokens, _ in sequences)), np.uint16),
        np.array([len(tokens) for tokens, _ in sequences], np.int32),
        np.array([mode for _, mode in sequences], np.int8),
        np.array([len(document) for document in documents], np.int32),
        7,
        0,
    )
    spool = TokenFiles(str(path), np.uint16, conversations)
    spool.append(corpus)
    spool.sync()
    return spool


def documents_of(spool):
    """The documents of a spool, as `spool_of` takes them."""
    tokens, lengths, sequences = (
        spool.read(name, 0, -1).tolist() for name in ("bin", "lengths", "sequences")
    )
    modes = spool.read("modes", 0, -1).tolist() if spool.conversations else [0] * len(lengths)
    ends = np.cumsum(lengths).tolist()
    found = iter(
        [
            (tokens[end - length : end], mode)
            for end, length, mode in zip(ends, lengths, modes, strict=True)
        ]
    )
    return [list(itertools.islice(found, count)) for count in sequences]


@pytest.mark.parametrize("conversations", [False, True])
@pytest.mark.parametrize("bucket_bytes", [2, 500, 10**9])
def test_documents_are_in_the_order_of_their_keys_whatever_the_buckets(
    tmp_path, monkeypatch, conversations, bucket_bytes
):
    monkeypatch.setattr(module, "_DOCUMENTS", 100)
    random = np.random.default_rng(0)
    lengths = [random.integers(0, 6, random.integers(1, 4)).tolist() for _ in range(250)]
    documents = [
        [
            (random.integers(0, 65535, n).tolist(), int(random.integers(2)) * conversations)
            for n in document
        ]
        for document in lengths
    ]
    order = np.argsort(np.random.Philox(5).random_raw(len(documents)), kind="stable")
    with (
        spool_of(tmp_path / "a", documents, conversations) as source,
        shuffle(source, str(tmp_path / "b"), 5, bucket_bytes) as target,
    ):
        assert documents_of(target) == [documents[i] for i in order]
        assert documents_of(source) == documents
        assert target.counts.tokens == source.counts.tokens and target.counts.bytes == 7
    assert {path.suffix for path in tmp_path.glob("b*")} == {".bin", ".lengths", ".sequences"} | (
        {".modes"} if conversations else set()
    )


def test_every_order_is_as_likely_as_any_other(tmp_path):
    seen = Counter()
    with spool_of(tmp_path / "a", [[([i], 0)] for i in range(3)], False) as source:
        for seed in range(600):
            with shuffle(source, str(tmp_path / "b"), seed, 2) as target:
                seen[tuple(target.read("bin", 0, 3).tolist())] += 1
    chi_squared = sum((count - 100) ** 2 / 100 for count in seen.values())
    assert (
        len(seen) == 6 and chi_squared < 20.5
    )  # 0.1% of six equally likely orders are further off


@pytest.fixture
def run(tmp_path):
    """A function: records and settings -> what is in the output folder."""

    def go(records, **options):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = PreprocessOptions(
            input=(str(tmp_path / "a.jsonl"),),
            output_prefix=str(tmp_path / "out" / "x"),
            tokenizer_type="ByteLevelTokenizer",
            **options,
        )
        for prefix in preprocess(settings).corpora:
            assert verify(prefix) == []
        return {path.name: path.read_bytes() for path in sorted((tmp_path / "out").iterdir())}

    return go


def test_a_shuffled_corpus_depends_on_the_seed_and_not_on_the_workers(run):
    records = [{"text": f"{i} " + "x" * (i % 900)} for i in range(2000)]
    first = run(records, shuffle=True, workers=1)
    assert len(first) == 3
    assert run(records, shuffle=True, seed=1234, workers=2) == first
    assert run(records, shuffle=True, seed=1)["x_text_document.bin"] != first["x_text_document.bin"]
    assert json.loads(first["x_text_document.json"])["sources"][0]["shuffled"] == 1234


def test_conversations_stay_complete_and_keys_stay_together(run, tmp_path):
    run(
        [{"instruction": f"{i}", "output": f"{i}"} for i in range(50)],
        kind="instruct",
        shuffle=True,
    )
    dataset = IndexedDataset(tmp_path / "out" / "x_document")
    texts = [bytes(i for i in dataset.document(n) if i < 256).decode() for n in range(50)]
    numbers = [text.removeprefix("### Instruction:").split("### Response:") for text in texts]
    assert all(asked == answered for asked, answered in numbers)
    assert (
        sorted(int(asked) for asked, _ in numbers)
        == list(range(50))
        != [int(asked) for asked, _ in numbers]
    )
    run([{"a": f"{i}", "b": f"{i}"} for i in range(50)], json_keys=("a", "b"), shuffle=True)
    both = [
        [dataset.document(n).tolist() for n in range(50)]
        for dataset in (IndexedDataset(tmp_path / "out" / f"x_{key}_document") for key in "ab")
    ]
    assert both[0] == both[1]
