"""What a run has left is never taken for what it is on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.checkpoint import lineage
from megatron_chatflow.checkpoint.lineage import Lineage
from megatron_chatflow.checkpoint.run_directory import (
    POINTER,
    begin_course,
    complete_iterations,
    find_intact_checkpoint,
    latest_iteration,
    on_course,
)
from megatron_chatflow.checkpoint.selection import choose_weights
from megatron_chatflow.errors import ChatflowError
from tests.checkpoint.run_folders import write_checkpoint
from tests.pool import Pool
from tests.sample import metrics, train

ROOT = Lineage("root")
OLD = ["--train-iters", "16", "--lr-decay-iters", "20", "--save-interval", "4"]
SKIP = ["--iterations-to-skip", "9", "10"]
NEW = ["--train-iters", "16", "--lr-decay-iters", "20", "--save-interval", "5", *SKIP]


def ok(results: list[tuple[int, str, str]]) -> str:
    for code, out, err in results:
        assert code == 0, (out, err)
    return results[0][1]


def numbers(folders: Any) -> list[int]:
    return [int(folder.name[5:]) for folder in folders]


@pytest.fixture(scope="module")
def old(pool: Pool, sample: Path) -> Path:
    """Sixteen iterations, saved every fourth."""
    run = sample / "old course"
    ok(pool.run(1, train, sample, "--save", str(run), *OLD))
    return run


@pytest.fixture(scope="module")
def sent_back(pool: Pool, sample: Path, old: Path) -> tuple[Path, str]:
    """Resume that run at iteration 8, train to 15 without samples 9 and 10; return its output."""
    run = sample / "sent back"
    shutil.copytree(old, run)
    words = ["--save", str(run), "--load", str(run), "--ckpt-step", "8", *NEW]
    return run, ok(pool.run(1, train, sample, *words, "--exit-interval", "15"))


def test_a_run_that_is_sent_back_names_what_it_leaves(sent_back: tuple[Path, str]) -> None:
    run, out = sent_back
    (line,) = [line for line in out.splitlines() if "not on the course" in line]
    assert "iterations 12, 16 in" in line and "--ckpt-step" in line
    assert complete_iterations(run) == [16, 15, 12, 10, 8, 4] and latest_iteration(run) == 15
    branches = [record["branch"] for record in all_records(run)]
    assert len(set(branches[:8])) == 1 and len(set(branches[8:])) == 1 and len(branches) == 15
    assert branches[0] != branches[-1]
    assert lineage.read_course(run) == Lineage(branches[-1], ((branches[0], 8),))


def all_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_fallback_stays_on_the_course(
    pool: Pool, sample: Path, sent_back: tuple[Path, str]
) -> None:
    """The checkpoint of 12 was trained on samples that the run has skipped."""
    run = sample / "fallback"
    shutil.copytree(sent_back[0], run)
    shard = run / "iter_0000015" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert find_intact_checkpoint(run, None, {})[0] == run / "iter_0000010"
    out = ok(pool.run(1, train, sample, "--save", str(run), "--load", str(run), *NEW))
    assert "resuming after iteration 10" in out and "iter_0000015 is damaged" in out
    assert "iteration 12 of" in out and "not on the course of the run" in out
    assert metrics(run)[:15] == metrics(sent_back[0]) and len(metrics(run)) == 16
    assert numbers(choose_weights(run, None, 4).folders) == [8, 10, 15, 16]


def test_a_mean_is_of_one_course(sent_back: tuple[Path, str]) -> None:
    run = sent_back[0]
    chosen = choose_weights(run, None, 3)
    assert numbers(chosen.folders) == [8, 10, 15]
    assert "without iteration 12, not on its course" in chosen.name
    assert numbers(choose_weights(run, 16, 3).folders) == [8, 12, 16]
    assert numbers(choose_weights(run, 12, 1).folders) == [12]
    with pytest.raises(
        ChatflowError, match=r"are 4 \(iteration 4, 8, 10, 15, without iteration 12"
    ):
        choose_weights(run, None, 5)


def test_what_was_left_can_be_loaded_by_its_number(
    pool: Pool, sample: Path, old: Path, sent_back: tuple[Path, str]
) -> None:
    run = sample / "back again"
    shutil.copytree(sent_back[0], run)
    words = ["--save", str(run), "--load", str(run), "--ckpt-step", "12", *OLD]
    out = ok(pool.run(1, train, sample, *words))
    (line,) = [line for line in out.splitlines() if "not on the course" in line]
    assert "iterations 10, 15, 16 in" in line
    # The records of 9 to 12 were cut when it was sent back.
    assert metrics(run) == metrics(old)[:8] + metrics(old)[12:]
    assert "metrics.jsonl: no record of iteration 9 to 12" in out


def test_a_run_killed_before_its_first_checkpoint_resumes_where_it_was_sent(
    pool: Pool, sample: Path, old: Path
) -> None:
    run = sample / "killed early"
    shutil.copytree(old, run)
    course, _ = begin_course(run, run / "iter_0000008", 8)  # the first thing that it writes
    assert latest_iteration(run) == 8
    out = ok(pool.run(1, train, sample, "--save", str(run), "--load", str(run), *OLD))
    assert "resuming after iteration 8" in out and metrics(run) == metrics(old)
    assert lineage.read_course(run) == course
    assert lineage.read_lineage(run / "iter_0000012") == course


def test_removal_neither_counts_nor_takes_what_was_left(
    pool: Pool, sample: Path, sent_back: tuple[Path, str]
) -> None:
    run = sample / "removal"
    shutil.copytree(sent_back[0], run)
    flags = ["--most-recent-k", "2"]
    ok(pool.run(1, train, sample, "--save", str(run), "--load", str(run), *NEW, *flags))
    assert complete_iterations(run) == [16, 15, 12]


def test_checkpoints_of_earlier_versions_are_one_course(tmp_path: Path) -> None:
    for iteration in (4, 8, 12):
        write_checkpoint(tmp_path, iteration, None)
    (tmp_path / "iter_0000012" / "common.pt").unlink()
    assert find_intact_checkpoint(tmp_path, None, {})[0] == tmp_path / "iter_0000008"
    assert numbers(choose_weights(tmp_path, None, 3).folders) == [4, 8, 12]
    course, notes = begin_course(tmp_path, tmp_path / "iter_0000008", 8)
    assert course.ancestors == (("unknown", 8),) and "iteration 12 in" in notes[0]
    write_checkpoint(tmp_path, 12, course)
    assert on_course(tmp_path, course, [12, 8, 4]) == [12, 8, 4]
    assert begin_course(tmp_path, tmp_path / "iter_0000012", 12) == (course, [])


def test_another_directory_begins_a_branch(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", 8, ROOT)
    course, notes = begin_course_in(tmp_path / "b", source, 8)
    assert course.ancestors == (("root", 8),) and not notes
    assert latest_iteration(tmp_path / "b") is None and latest_iteration(tmp_path / "a") == 8


def begin_course_in(run: Path, checkpoint: Path, iteration: int) -> tuple[Lineage, list[str]]:
    run.mkdir()
    return begin_course(run, checkpoint, iteration)


def test_where_the_course_is_not_known_nothing_is_guessed(tmp_path: Path) -> None:
    branch = Lineage("branch", (("root", 8),))
    for iteration, course in ((4, ROOT), (8, ROOT), (12, branch), (16, ROOT)):
        write_checkpoint(tmp_path, iteration, course)
    (tmp_path / POINTER).write_text("20\n")
    with pytest.raises(ChatflowError, match="16 does not continue iteration 12; give --ckpt-step"):
        find_intact_checkpoint(tmp_path, None, {})
    lineage.write_course(tmp_path, branch)
    found, notes = find_intact_checkpoint(tmp_path, None, {})
    assert found == tmp_path / "iter_0000012" and "iteration 16 of" in " ".join(notes)
    for text in (b"", b"x", None):
        (tmp_path / POINTER).unlink() if text is None else (tmp_path / POINTER).write_bytes(text)
        assert find_intact_checkpoint(tmp_path, None, {})[0] == tmp_path / "iter_0000012"


def test_a_lineage_is_read_only_from_what_was_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, ROOT)
    assert lineage.read_lineage(folder) == ROOT
    text = (folder / "state.json").read_text()
    for changed in (text.replace("root", "rood"), "{}", "[]", "", "\0", "{" * 100_000):
        (folder / "state.json").write_text(changed)
        assert lineage.read_lineage(folder) is None
    old = write_checkpoint(tmp_path, 8, None)
    for value in (5, [], {}, {"branch": 1, "ancestors": []}, {"branch": "a", "ancestors": [["b"]]}):
        (old / "state.json").write_text(json.dumps({"lineage": value}))
        assert lineage.read_lineage(old) is None
