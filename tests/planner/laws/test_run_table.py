"""Tables of runs: what is written reads back, and what is wrong is named with its line."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.errors import ConfigError, ConfigErrors
from megatron_chatflow.planner.laws.run_table import RunRecord, read_table, write_table

WORD = st.text("abcxyz -,\"'é中", min_size=1, max_size=6).map(str.strip).filter(
    lambda text: text and text.lower() not in ("nan", "none", "null", "na")
)  # fmt: skip
SHARE = st.floats(0, 1)
POSITIVE = st.floats(1e-3, 1e30)
RECORD = st.builds(
    RunRecord,
    name=WORD,
    params=st.integers(1, 10**12),
    tokens=st.integers(1, 10**14),
    loss=POSITIVE,
    bits_per_byte=st.none() | POSITIVE,
    kind=st.sampled_from(["scratch", "continued"]),
    language=st.just("") | WORD,
    share=st.none() | SHARE,
    replay=st.none() | SHARE,
    seed=st.none() | st.integers(0, 99),
    flops=st.none() | POSITIVE,
    annealed=st.none() | st.booleans(),
    tokenizer=st.just("") | WORD,
    mixture=st.dictionaries(WORD, SHARE, max_size=3),
)


def table(folder: Path, text: str) -> Path:
    path = folder / "runs.csv"
    path.write_text(text, encoding="utf-8")
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORD, min_size=1, max_size=4))
def test_a_written_table_reads_back_to_the_same_records(records: list[RunRecord]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        write_table(path, records)
        assert read_table(path) == records


def test_columns_of_other_names_and_a_part_of_the_rows_are_read(tmp_path: Path) -> None:
    header = "params,params_no_embed,tokens,set,loss\n"
    path = table(tmp_path, header + "9,7,20,c4,3.5\n9,7,40,c4,3.25\n9,7,20,en,4\n")
    found = read_table(path, {"params": "params_no_embed"}, {"set": "c4"})
    assert [(r.name, r.params, r.tokens, r.loss) for r in found] == [
        ("line 2", 7, 20, 3.5),
        ("line 3", 7, 40, 3.25),
    ]


def test_a_number_chooses_rows_however_it_is_written(tmp_path: Path) -> None:
    path = table(tmp_path, "params,tokens,loss,multiplier\n5,20,3,0.50\n5,40,2,1\n")
    assert [r.tokens for r in read_table(path, where={"multiplier": "0.5"})] == [20]


def test_tokens_follow_from_the_operations_where_the_table_has_no_tokens(tmp_path: Path) -> None:
    path = table(
        tmp_path, "Model Size,Training FLOP,loss\n4.2e8,2.1168e19,2.5\n4.2e8,1.0584e19,2.6\n"
    )
    found = read_table(path, {"params": "Model Size", "flops": "Training FLOP"})
    assert [(r.params, r.tokens) for r in found] == [
        (420_000_000, 8_400_000_000),
        (420_000_000, 4_200_000_000),
    ]


@pytest.mark.parametrize(
    ("text", "columns", "where", "message"),
    [
        ("", {}, {}, "no runs"),
        ("params,tokens,loss\n", {}, {}, "no runs"),
        ("params,tokens\n1,2\n", {}, {}, "no column loss; .*--columns loss=COLUMN"),
        ("N,tokens,loss\n1,2,3\n", {"params": "n"}, {}, "no column 'n'; its columns are N"),
        ("N,tokens,loss\n1,2,3\n", {"parms": "N"}, {}, "did you mean params"),
        ("params,tokens,loss\n1,2,3\n", {}, {"set": "c4"}, "no column 'set'"),
        ("params,tokens,loss,set\n1,2,3,en\n", {}, {"set": "c4"}, "no row .* it has en"),
        ("params,tokens,loss\n1,2,3\n1,0,3\n", {}, {}, "line 3: tokens: '0' is not a number"),
        ("params,tokens,loss\n1,2,inf\n", {}, {}, "line 2: loss: 'inf' is not a positive number"),
        ("params,tokens,loss,share\n1,2,3,30\n", {}, {}, "'30' is not a share from 0 to 1"),
        ("params,tokens,loss,kind\n1,2,3,cpt\n", {}, {}, "one of scratch, continued"),
        ("params,tokens,loss\n1,2,\n", {}, {}, "line 2: the run has no loss"),
        ("params,tokens,loss\n,2,3\n", {}, {}, "line 2: params is empty"),
        ("params,tokens,loss\n1,2\n", {}, {}, "line 2 has 2 cells and the header 3"),
        ("params,params,tokens,loss\n1,2,3,4\n", {}, {}, "twice"),
        ('params,tokens,loss\n"1,2,3\n', {}, {}, "is not CSV"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_table_is_named(
    tmp_path: Path, text: str, columns: dict, where: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_table(table(tmp_path, text), columns, where)


def test_all_wrong_cells_are_reported_together(tmp_path: Path) -> None:
    path = table(tmp_path, "params,tokens,loss\nx,2,3\n1,y,z\n")
    with pytest.raises(ConfigErrors) as error:
        read_table(path)
    assert len(error.value.messages) == 3


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv: No such file"):
        read_table(tmp_path / "none.csv")
