"""A JSON array as input: read as its elements on lines would be, however it is laid out and cut; or
refused.
"""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.cli.preprocess import main
from megatron_chatflow.data import read_manifest
from megatron_chatflow.data.preprocess.input_files import InputSource
from megatron_chatflow.data.preprocess.json_array import BrokenArray, lines
from megatron_chatflow.data.preprocess.options import PreprocessOptions
from megatron_chatflow.data.preprocess.pipeline import preprocess
from megatron_chatflow.data.preprocess.records import read_texts
from megatron_chatflow.data.preprocess.summary import MalformedInput
from megatron_chatflow.errors import ChatflowError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\{}[],:\n é')),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.sampled_from('a"\\{},')), inner, max_size=3)
    ),
    max_leaves=8,
)


def cut(text: bytes, size: int):
    return iter([text[at : at + size] for at in range(0, len(text), size)])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(values, max_size=8),
    st.integers(1, 40),
    st.sampled_from([None, 0, 2]),
    st.sampled_from(["", " \n"]),
)
def test_elements_are_those_that_json_reads(elements, size, indent, around):
    text = (around + json.dumps(elements, indent=indent, ensure_ascii=False) + around).encode()
    begin = text.index(b"[") + 1
    blocks = cut(text[begin:], size)
    found = b"".join(lines(iter([text[:begin], *blocks]), 1 << 30))
    assert found == b"" or found.endswith(b"\n")
    assert [json.loads(line) for line in found.splitlines()] == elements


@settings(max_examples=200, deadline=None)
@given(st.lists(values, max_size=8), st.integers(1, 40), st.integers(1, 30))
def test_elements_beyond_the_limit_are_none_and_the_others_stay(elements, size, limit):
    text = json.dumps(elements, ensure_ascii=False, separators=(",", ":")).encode()
    found = list(lines(cut(text, size), limit))
    written = [
        json.dumps(element, ensure_ascii=False, separators=(",", ":")).encode()
        for element in elements
    ]
    expected = [element if len(element) <= limit else None for element in written]
    flat = []
    for block in found:
        flat.extend([None] if block is None else block.split(b"\n")[:-1])
    assert flat == expected


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_array_that_does_not_end_in_an_element_beyond_the_limit_is_refused(size):
    for text in (
        b'[1,{"a": "xxxxxxxxxxxx',
        b'[1,{"a": "xxxxxxxxxxxx\\',
        b'[1,{"a": "xxxxxxxxxxxx"',
        b"[1,[[[[[[[[[[[[[",
    ):
        with pytest.raises(BrokenArray, match="does not end, and record 2 is the last"):
            list(lines(cut(text, size), 5))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('[{"a": 1}, {"b": 2]', "do not match in record 2"),
        ('[{"a": 1}}]', "do not match in record 1"),
        ('[{"a": 1}, {"b": 2}', "does not end, and record 2 is the last"),
        ('[{"a": "x', "does not end"),
        ('[{"a": 1}]\n{"a": 2}', "something follows the array"),
        ("[1, 2]\n[3]", "something follows the array"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_array_whose_elements_cannot_be_separated_is_refused(text, part, size):
    with pytest.raises(BrokenArray, match=part):
        list(lines(iter([b"[", *cut(text.encode()[1:], size)]), 1 << 30))


def test_memory_is_bounded_by_the_largest_element():
    record = json.dumps({"text": "x" * 1000}).encode()

    def blocks():
        yield b"["
        for _ in range(40):
            yield (record + b",\n") * 250
        yield b'{"text": "' + b"y" * 1_000_000
        yield b'"}]'

    tracemalloc.start()
    count = sum(block.count(b"\n") for block in lines(blocks(), 1 << 30))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_001 and peak < 6_000_000


RECORDS = [{"text": f'line {i}\n"quoted", [{i}] {{}} é'} for i in range(4000)]


def preprocessed(folder, name, data, **changes):
    (folder / name).write_bytes(data)
    words = {"tokenizer_type": "ByteLevelTokenizer", "append_eod": True} | changes
    prefix = folder / name.replace(".", "_")
    summary = preprocess(
        PreprocessOptions(input=(str(folder / name),), output_prefix=str(prefix), **words)
    )
    return (folder / f"{prefix.name}_text_document.bin").read_bytes(), summary


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("compact.json", lambda text: text),
        ("indented.json", lambda text: json.dumps(json.loads(text), indent=2).encode()),
        ("bom.json", lambda text: b"\xef\xbb\xbf\n  " + text),
        ("packed.json.gz", gzip.compress),
    ],
)
def test_an_array_gives_the_corpus_of_its_elements_on_lines(tmp_path, name, write):
    plain, _ = preprocessed(
        tmp_path, "lines.jsonl", b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
    )
    for workers in (1, 2) if name == "indented.json" else (1,):
        data = write(json.dumps(RECORDS, ensure_ascii=False).encode())
        assert preprocessed(tmp_path, name, data, workers=workers)[0] == plain
    assert list(read_texts([str(tmp_path / name)])) == [record["text"] for record in RECORDS]


def test_a_zstandard_array_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.json.zst"
    path.write_bytes(zstandard.compress(json.dumps(RECORDS).encode()))
    assert list(read_texts([str(path)])) == [record["text"] for record in RECORDS]


def test_chunks_are_the_same_at_every_reading_and_number_the_elements(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, indent=1))
    first, second = (list(InputSource(str(path)).chunks(1 << 14)) for _ in range(2))
    assert first == second and len(first) > 5
    assert [chunk.next for chunk in first[:-1]] == [chunk.first for chunk in first[1:]]
    assert (first[0].first, first[-1].next) == (1, len(RECORDS) + 1)


def test_messages_name_the_record(tmp_path):
    with pytest.raises(MalformedInput, match="a.json, record 3: "):
        preprocessed(
            tmp_path,
            "a.json",
            (
                b'[\n{"text": "a"},\n\n{"text":\n"b"}, {"txt": "c"}, 5, {"text": "a\nb"}, , '
                b'{"text": "d"}]'
            ),
        )
    with pytest.raises(ChatflowError, match="a.json: brackets do not match in record 2"):
        preprocessed(
            tmp_path,
            "a.json",
            b'[{"text": "a"}, {"text": "b"], {"text": "c"}]',
            skip_malformed=True,
        )
    _, summary = preprocessed(
        tmp_path,
        "a.json",
        b'[{"text": "a"}, {"text": "a\nb"}, , {"text": "d"},]',
        skip_malformed=True,
        max_malformed=0.5,
    )
    assert [shown.split(":")[0] for shown in summary.shown] == [
        "a.json, record 2",
        "a.json, record 3",
    ]
    assert read_manifest(tmp_path / "a_json_text_document").documents == 2


def test_a_record_over_several_lines_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(
        MalformedInput,
        match="it continues on the next line; write each record on one line, or one JSON array",
    ):
        preprocessed(tmp_path, "a.json", json.dumps(RECORDS[0], indent=2).encode())


@pytest.mark.parametrize(
    ("malformed", "most", "refused"),
    [
        (5, None, False),
        (6, None, True),
        (50, 0.5, False),
        (51, 0.5, True),
        (1, 0.0, True),
        (99, 1.0, False),
        (29, 0.29, False),
    ],
)
@pytest.mark.parametrize("kind", ["text", "instruct"])
def test_more_malformed_records_than_allowed_write_nothing(
    tmp_path, kind, malformed, most, refused
):
    good = {"text": "a"} if kind == "text" else {"instruction": "a", "output": "b"}
    records = [{"other": 1}] * malformed + [good] * (100 - malformed)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    words = {"kind": kind, "skip_malformed": True, "max_malformed": most}
    (tmp_path / "a.jsonl").write_bytes(data)
    run = PreprocessOptions(
        input=(str(tmp_path / "a.jsonl"),),
        output_prefix=str(tmp_path / "out"),
        tokenizer_type="ByteLevelTokenizer",
        **words,
    )
    if refused:
        with pytest.raises(
            MalformedInput, match=f"{malformed} of 100 records are malformed, more than the share"
        ):
            preprocess(run)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    else:
        assert preprocess(run).malformed == malformed


@pytest.mark.parametrize(("good", "refused"), [(19 * 40, False), (19 * 40 - 1, True)])
def test_the_share_is_of_all_records_where_malformed_ones_are_large_and_come_first(
    tmp_path, good, refused
):
    path = tmp_path / "a.jsonl"
    large = json.dumps({"other": "x" * 500_000}).encode() + b"\n"
    path.write_bytes(large * 40 + b'{"text":"a"}\n' * good)
    words = {"tokenizer_type": "ByteLevelTokenizer", "skip_malformed": True}
    out = str(tmp_path / "out")
    run = PreprocessOptions(input=(str(path),), output_prefix=out, **words)
    if refused:
        with pytest.raises(MalformedInput, match="40 of 799 records are malformed"):
            preprocess(run)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    else:
        assert preprocess(run).malformed == 40


@pytest.mark.parametrize(
    ("share", "skip"), [(0.1, False), (1.5, True), (-0.1, True), (float("nan"), True)]
)
def test_a_share_without_meaning_is_refused(tmp_path, share, skip):
    with pytest.raises(ChatflowError, match="--max-malformed"):
        preprocessed(tmp_path, "a.jsonl", b"{}\n", max_malformed=share, skip_malformed=skip)


@pytest.mark.parametrize("data", [b"", b"[]", b"\n\n"])
def test_an_input_without_documents_exits_with_1_as_the_help_says(tmp_path, data, capsys):
    (tmp_path / "a.jsonl").write_bytes(data)
    paths = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "out")]
    assert main([*paths, "--tokenizer-type", "ByteLevelTokenizer", "--workers", "1"]) == 1
    assert "no document is left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
