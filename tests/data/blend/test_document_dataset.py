"""Complete documents in windows, against a slow reader; and the files they come from."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.data.blend.document_dataset import DocumentDataset
from megatron_chatflow.data.preprocess.records import read_texts
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("ByteLevelTokenizer")
TEXTS = st.lists(st.text(max_size=40), min_size=1, max_size=8)


@given(TEXTS, st.integers(1, 24))
def test_every_byte_is_a_label_once_and_follows_what_comes_before_it_in_its_document(
    texts, seq_length
):
    documents = DocumentDataset(texts, TOKENIZER, start=TOKENIZER.eod, seq_length=seq_length)
    batch = documents.read_window(np.arange(documents.num_samples))
    found = []
    for row in range(documents.num_samples):
        for segment in range(int(batch["segment_ids"][row].max()) + 1):
            inside = batch["segment_ids"][row] == segment
            if not batch["loss_mask"][row][inside].any():
                continue
            assert batch["loss_mask"][row][inside].all()
            tokens, labels = (
                batch["tokens"][row][inside].tolist(),
                batch["labels"][row][inside].tolist(),
            )
            assert tokens[1:] == labels[:-1]
            assert batch["position_ids"][row][inside].tolist() == list(range(len(tokens)))
            found.append((tokens[0], *labels))
    expected = []
    for text in texts:
        stream = [TOKENIZER.eod, *text.encode()]
        expected += [
            tuple(stream[at : at + seq_length + 1]) for at in range(0, len(stream) - 1, seq_length)
        ]
    assert sorted(found) == sorted(expected)
    assert (
        documents.bytes
        == int(batch["loss_mask"].sum())
        == sum(len(text.encode()) for text in texts)
    )
    assert (documents.num_documents, documents.num_changed) == (len(texts), 0)


def test_padding_is_a_separate_segment():
    batch = DocumentDataset(["ab", "c"], TOKENIZER, start=TOKENIZER.eod, seq_length=8).read_window(
        np.array([0])
    )
    assert batch["segment_ids"][0].tolist() == [0, 0, 1, 2, 2, 2, 2, 2]
    assert batch["loss_mask"][0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_documents_that_a_tokenizer_changes_are_counted_and_their_bytes_are_those_of_the_text():
    numbers = load_tokenizer("NullTokenizer", vocab_size=100)
    documents = DocumentDataset(["1 2", "3  4", "05"], numbers, start=numbers.eod, seq_length=4)
    assert (documents.num_changed, documents.bytes) == (2, 3 + 4 + 2)


def test_json_lines_plain_text_and_packed_files_hold_the_same_documents(tmp_path):
    texts = ["One line.", "第二份文件。"]
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz"):
        assert list(read_texts([str(tmp_path / name)])) == texts


def test_a_record_without_text_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"txt": "b"}\n', encoding="utf-8")
    with pytest.raises(ChatflowError, match=r"a\.jsonl, line 3: no key 'text'; fix it"):
        list(read_texts([str(path)]))
    path.write_text('{"text": "a"}\nb\n', encoding="utf-8")
    with pytest.raises(ChatflowError, match=r"a\.jsonl, line 2: not JSON"):
        list(read_texts([str(path)]))
    with pytest.raises(ChatflowError, match=r"^.*nowhere\.txt cannot be read \(No such file"):
        list(read_texts([str(tmp_path / "nowhere.txt")]))
