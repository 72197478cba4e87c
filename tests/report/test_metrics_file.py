"""metrics.jsonl after anything that happens to a file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.report.metrics_file import parse_record, prepare_records, read_records

ROOT = Path(__file__).resolve().parents[2]


def training(iteration: int, loss: float = 2.5) -> dict[str, Any]:
    values = {
        "samples": 8,
        "share": 1.0,
        "share_target": 1.0,
        "loss": loss,
        "tokens": 8 * iteration,
    }
    return {"iteration": iteration, "batch-size": 8, "lm loss": loss, "domains": {"en": values}}


def validation(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "lm loss validation": 2.0, "validation": {"en": {"loss": 2.0}}}


def line(record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


RUN = [line(validation(0)), *(line(training(i)) for i in range(1, 11)), line(validation(10))]
"""Of a run of ten iterations."""
BAD = {
    "half a line and its end": line(training(4))[:40] + b"\n",
    "zeros": b"\0" * 512 + b"\n",
    "zeros before a record": b"\0" * 9 + line(training(4)),
    "a comment": b"# lowered the rate here\n",
    "invalid UTF-8": b'{"iteration": 4, "stage": "\xff\xfe", "domains": {}}\n',
    "UTF-16": json.dumps(training(4)).encode("utf-16") + b"\n",
    "a number": b"17\n",
    "a number too long": b"1" * 5000 + b"\n",
    "null": b"null\n",
    "text": b'"iteration"\n',
    "a list": b"[1, 2]\n",
    "a note": b'{"iteration": 4, "note": "x"}\n',
    "no iteration": b'{"domains": {}}\n',
    "an iteration as text": b'{"iteration": "4", "domains": {}}\n',
    "true": b'{"iteration": true, "domains": {}}\n',
    "a fraction": b'{"iteration": 4.5, "domains": {}}\n',
    "a negative iteration": b'{"iteration": -4, "domains": {}}\n',
    "no domains": b'{"iteration": 4, "domains": [1]}\n',
    "an empty line": b"\n",
    "white space": b"  \t\r\n",
    "deeply nested": b"[" * 100_000 + b"\n",
    "two records": line(training(4))[:-1] + line(training(5)),
    "a word in a number's place": line(training(4)).replace(b"2.5", b"oops"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 5, len(RUN)])
def test_a_bad_line_is_moved_with_one_note(tmp_path: Path, name: str, place: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([*RUN[:place], BAD[name], *RUN[place:]]))
    assert len(read_records(path)[0]) == len(RUN) and read_records(path)[1] == [place + 1]
    notes = prepare_records(path, 10, validated=True)
    assert notes == [f"{path}: 1 line is not a record of this run; moved to metrics.jsonl.bad"]
    assert path.read_bytes() == b"".join(RUN)
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == BAD[name]
    assert prepare_records(path, 10, validated=True) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.jsonl.bad"]


def test_many_bad_lines_are_one_note(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b"".join(part for pair in zip(RUN, BAD.values(), strict=False) for part in pair)
    )
    (note,) = prepare_records(path, 10, validated=True)
    assert "12 lines are not records" in note and path.read_bytes() == b"".join(RUN)


@pytest.mark.parametrize("half", [b"", b"{", line(training(11))[:-1], b"\0" * 4096, b"\xff"])
# fmt: skip
@pytest.mark.parametrize(
    ("iteration", "validated", "kept"),
    [(10, True, 12), (10, False, 11), (7, True, 8), (0, False, 0)],
)
def test_later_records_and_half_a_line_are_cut_without_a_word(
    tmp_path: Path, half: bytes, iteration: int, validated: bool, kept: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(RUN) + half)
    assert read_records(path)[1] == []
    assert prepare_records(path, iteration, validated=validated) == []
    assert path.read_bytes() == b"".join(RUN[:kept])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_gaps_and_repeated_iterations_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for kept, note in (
        ([1, 2, 5, 6, 8], "no record of iteration 3 to 4, 7"),
        ([1, 2, 3], "no record of iteration 4 to 8"),
        (
            [1, 2, 3, 3, 2, 4, 5, 6, 7, 8],
            "more than one record, or one in the wrong place, of iteration 3, 2",
        ),
        (
            list(range(1, 41, 3)),
            "no record of iteration 2 to 3, 5 to 6, 8 to 9, 11 to 12, 14 to 15, ... (13 in all)",
        ),
    ):
        content = b"".join(line(training(i)) for i in kept)
        path.write_bytes(content)
        assert prepare_records(path, max(8, kept[-1]), validated=True) == [f"{path}: {note}"]
        assert path.read_bytes() == content
    for kept in ([5, 6, 7, 8], []):  # a run that continues another directory's; one that starts
        path.write_bytes(b"".join(line(training(i)) for i in kept))
        assert prepare_records(path, 8, validated=True) == []


def test_records_of_another_course_are_cut_or_moved(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def of(branch: str, *iterations: int) -> list[bytes]:
        return [line(training(i) | {"branch": branch} | {"time": {}}) for i in iterations]

    lines = [*of("aa", 1, 2, 3, 4), *of("b1", 3, 4), *of("b2", 3, 4, 5)]
    path.write_bytes(b"".join(lines))
    ends = {"aa": 2, "b2": 99}
    notes = prepare_records(path, 4, validated=True, course=lambda name, i: i <= ends.get(name, 0))
    assert path.read_bytes() == b"".join([*of("aa", 1, 2), *of("b2", 3, 4)])
    moved = (tmp_path / "metrics.jsonl.bad").read_bytes()
    assert moved == b"".join([*of("aa", 3, 4), *of("b1", 3, 4)])
    assert notes == [f"{path}: 4 lines are not records of this run; moved to metrics.jsonl.bad"]
    notes = prepare_records(path, 4, validated=True, course=lambda name, i: name == "aa")
    assert path.read_bytes() == b"".join(of("aa", 1, 2))
    assert notes == [f"{path}: no record of iteration 3 to 4"]


def test_later_records_in_the_middle_are_moved(tmp_path: Path) -> None:
    """Of a second run in the same directory."""
    path = tmp_path / "metrics.jsonl"
    stray = [line(training(i)) for i in (11, 12)]
    path.write_bytes(b"".join([*RUN[:5], *stray, *RUN[5:], *stray]))
    (note,) = prepare_records(path, 10, validated=True)
    assert "2 lines are not records of this run" in note
    assert path.read_bytes() == b"".join(RUN)
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == b"".join(stray)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_is_kept_are_the_records_of_the_run(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes anywhere: no exception, every complete line is kept or moved, and the second pass finds
    nothing more to move."""
    path = tmp_path_factory.mktemp("fuzz") / "metrics.jsonl"
    content = bytearray(b"".join(RUN))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        size = data.draw(st.sampled_from([0, 1, 7, 200]))
        junk = st.binary(max_size=40) | st.sampled_from([b"\n", *RUN, *BAD.values()])
        content[at : at + size] = data.draw(junk)
    path.write_bytes(content)
    iteration = data.draw(st.integers(0, 12))
    prepare_records(path, iteration, validated=True)
    records, bad = read_records(path)
    assert not bad and all(record["iteration"] <= iteration for record in records)
    wanted = [
        part
        for part in bytes(content).split(b"\n")[:-1]
        if (record := parse_record(part)) and record["iteration"] <= iteration
    ]
    assert path.read_bytes() == b"".join(part + b"\n" for part in wanted)
    before = path.read_bytes()
    assert not any("moved" in note for note in prepare_records(path, iteration, validated=True))
    assert path.read_bytes() == before


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    peaks = []
    for count in (2_000, 20_000):
        path.write_bytes(b"".join(line(training(i, i / 7)) for i in range(1, count + 1)))
        tracemalloc.start()
        assert prepare_records(path, count, validated=True) == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


@pytest.mark.slow
def test_a_million_records_are_looked_at_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    names = ("en", "zh", "en-zh", "instruct")
    with open(path, "wb") as file:
        for i in range(1, 1_000_001):
            record = training(i, 1 / i)
            file.write(line(record | {"domains": dict.fromkeys(names, record["domains"]["en"])}))
    begin = time.process_time()
    assert prepare_records(path, 1_000_000, validated=True) == []
    assert time.process_time() - begin < 30


def test_the_tools_name_bad_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*RUN[:5], *BAD.values(), *RUN[5:]]))
    call = [sys.executable, ROOT / "tools" / "plot_run.py", tmp_path]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "12 records drawn" in done.stdout, done
    assert f"line 6 and {len(BAD) - 1} more: not a record" in done.stderr
    other = {"iteration": 3, "domains": {"en": 5}}
    (tmp_path / "metrics.jsonl").write_bytes(line(other))
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not what a run writes" in done.stderr
    assert "Traceback" not in done.stderr
    from megatron_chatflow.cli.compare import main

    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*RUN[:5], b"17\n", *RUN[5:]]))
    assert main([str(tmp_path), str(tmp_path)]) == 2
