"""What a run has left is never taken for what it is on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_chatflow.checkpoint import lineage
from megatron_chatflow.checkpoint.lineage import Lineage
from megatron_chatflow.checkpoint.run_directory import (
    POINTER,
    begin_course,
    complete_iterations,
    find_checkpoint,
    find_intact_checkpoint,
    iteration_folder,
    latest_iteration,
    on_course,
    outdated_on_course,
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
    """The same, sent back to iteration 8 and on to 15 without the samples of 9 and 10; its
    output.
    """
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


POINTERS = ["\u0663\n", "\u00b2\n", "\u0967\u0968\n", "\uff14\n", "4\u0000\n", "0x4\n", "4.0\n",
"-4\n", "+4\n", "1_0\n", "4 8\n",
            "release\n", "iter_0000004\n", "", "\n", "9" * 5000, "9" * 30, "\u2028"]  # fmt: skip
RAW = [b"\xff\xfe", b"\x80", b"4\n\xff", b"\0" * 4096, b"\xef\xbb\xbf4\n", "4\n".encode("utf-16")]


@pytest.mark.parametrize("content", [*(text.encode() for text in POINTERS), *RAW])
def test_a_damaged_pointer_is_one_message(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path, 4, ROOT)
    write_checkpoint(tmp_path, 8, ROOT)
    (tmp_path / POINTER).write_bytes(content)
    for find in (latest_iteration, lambda run: find_checkpoint(run, None)):
        with pytest.raises(ChatflowError) as error:
            find(tmp_path)
        assert "not an iteration; write the number" in str(error.value)
        assert str(error.value).isprintable() and len(str(error.value)) < 400
    found, notes = find_intact_checkpoint(tmp_path, None, {})
    assert found == tmp_path / "iter_0000008" and len(notes) == 1


def test_a_missing_or_unreadable_pointer_is_one_message(tmp_path: Path) -> None:
    assert find_intact_checkpoint(tmp_path, None, {}) == (None, [])
    assert find_checkpoint(tmp_path, None) is None
    write_checkpoint(tmp_path, 4, ROOT)
    (tmp_path / POINTER).unlink()
    with pytest.raises(ChatflowError, match="is missing; give --ckpt-step one of iteration 4"):
        find_checkpoint(tmp_path, None)
    assert "is missing: going back to" in find_intact_checkpoint(tmp_path, None, {})[1][0]
    (tmp_path / POINTER).mkdir()
    with pytest.raises(ChatflowError, match="cannot be read"):
        latest_iteration(tmp_path)
    assert "cannot be read" in find_intact_checkpoint(tmp_path, None, {})[1][0]


@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=30)
    | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
# fmt: skip
def test_any_pointer_is_a_number_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    run = tmp_path_factory.mktemp("pointer")
    (run / POINTER).write_bytes(content)
    try:
        found = latest_iteration(run)
    except ChatflowError as error:
        assert str(error).isprintable()
    else:
        assert str(found).encode() == content.strip().lstrip(b"0") or not found


def test_folders_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4, ROOT)
    for name in (
        "iter_\u0660\u0660\u0660\u0660\u0660\u0660\u0668",
        "iter_00000008",
        "iter_8",
        "iter_0000008.bak",
    ):
        shutil.copytree(tmp_path / "iter_0000004", tmp_path / name)
    assert complete_iterations(tmp_path) == [4]


class RunDirectory(RuleBasedStateMachine):
    """A run directory against a model that knows what every iteration was trained on.

    A checkpoint's history has one mark per iteration, another one in every launch. What is taken
    in place of a damaged checkpoint, or averaged with one, must have a beginning of its history.
    """

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.run = Path(str(self.folder)) / f"run{next(COUNT)}"
        self.launch = self.begun = 0
        self.history: list[int] = []
        """Of the run that is going on, or of its last checkpoint."""
        self.saved: dict[int, list[int]] = {}
        self.broken: set[int] = set()
        self.pointer_is_whole = self.course_is_whole = True

    @initialize()
    def start(self) -> None:
        self.run.mkdir()
        self.course, notes = begin_course(self.run, None, 0)
        assert not notes
        self.go_on(4)
        self.save(2, None)

    def go_on(self, iterations: int) -> None:
        self.history = [*self.history, *[self.launch] * iterations]

    @rule(iterations=st.integers(1, 5))
    def train(self, iterations: int) -> None:
        self.go_on(iterations)

    @rule(keep=st.none() | st.integers(1, 3), interval=st.none() | st.integers(2, 5))
    def save(self, keep: int | None, interval: int | None) -> None:
        iteration = len(self.history)
        if iteration == self.begun:  # a run does not save what it continues from
            return
        self.write(iteration, pointed=True)
        self.pointer_is_whole = True
        own = [i for i in self.saved if self.continues(self.history, i)]
        for i in outdated_on_course(self.run, self.course, iteration, keep, interval):
            assert i in own and i != iteration
            shutil.rmtree(iteration_folder(self.run, i))
            del self.saved[i]
        if keep is not None:
            intact = [i for i in own if i not in self.broken]
            assert set(sorted(intact)[-keep:]) <= set(self.saved)

    def write(self, iteration: int, *, pointed: bool) -> None:
        write_checkpoint(self.run, iteration, self.course, pointed=pointed)
        self.saved[iteration] = self.history
        self.broken.discard(iteration)

    def continues(self, history: list[int], iteration: int) -> bool:
        return history[:iteration] == self.saved[iteration]

    @rule(iterations=st.integers(1, 5))
    def killed_before_the_pointer(self, iterations: int) -> None:
        before = latest_iteration(self.run) if self.pointer_is_whole else None
        if before is None:
            return
        self.go_on(iterations)
        self.write(len(self.history), pointed=False)
        self.history = self.saved[before]
        self.resume()

    @rule()
    def resume(self) -> None:
        pointed = latest_iteration(self.run) if self.pointer_is_whole else None
        before = self.saved.get(pointed) if pointed is not None else None
        knows = before is not None and (self.course_is_whole or pointed not in self.broken)
        try:
            found, notes = find_intact_checkpoint(self.run, None, {})
        except ChatflowError:
            sound = [
                i
                for i in self.saved
                if i not in self.broken and before and self.continues(before, i)
            ]
            assert not knows or not sound
            return
        iteration = int(found.name[5:])
        assert iteration not in self.broken
        if knows:
            sound = [i for i in self.saved if i <= pointed and i not in self.broken]
            assert iteration == max(i for i in sound if self.continues(before, i))
            assert bool(notes) == (iteration != pointed)
        self.continue_from(iteration)

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def send_back(self, data: st.DataObject) -> None:
        iteration = data.draw(st.sampled_from(sorted(self.saved)))
        if iteration in self.broken:
            with pytest.raises(ChatflowError):
                find_intact_checkpoint(self.run, iteration, {})
            return
        assert numbers([find_intact_checkpoint(self.run, iteration, {})[0]]) == [iteration]
        self.continue_from(iteration)

    def continue_from(self, iteration: int) -> None:
        self.launch, self.begun = self.launch + 1, iteration
        self.course, notes = begin_course(
            self.run, iteration_folder(self.run, iteration), iteration
        )
        self.history = self.saved[iteration]
        self.pointer_is_whole = self.course_is_whole = True
        assert latest_iteration(self.run) == iteration
        left = {i for i in self.saved if i > iteration or not self.continues(self.history, i)}
        assert bool(notes) == bool(left - self.unreadable())
        assert lineage.read_course(self.run) == self.course

    def unreadable(self) -> set[int]:
        folders = {i: iteration_folder(self.run, i) for i in self.saved}
        return {i for i, folder in folders.items() if lineage.read_lineage(folder) is None}

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=st.sampled_from(["state.json", "__0_0.distcp", "manifest.json"]))
    def damage(self, data: st.DataObject, name: str) -> None:
        iteration = data.draw(st.sampled_from(sorted(self.saved)))
        path = iteration_folder(self.run, iteration) / name
        path.write_bytes(path.read_bytes()[:-2] + b"?")
        self.broken.add(iteration)

    @rule(content=st.sampled_from([b"", b"x", b"\xff", b"99\n"]))
    def damage_the_pointer(self, content: bytes) -> None:
        (self.run / POINTER).write_bytes(content)
        self.pointer_is_whole = False

    @rule()
    def lose_the_course(self) -> None:
        (self.run / lineage.FILE).unlink(missing_ok=True)
        self.course_is_whole = False

    @precondition(lambda self: self.pointer_is_whole)
    @rule(count=st.integers(2, 4))
    def average(self, count: int) -> None:
        try:
            chosen = numbers(choose_weights(self.run, None, count).folders)
        except ChatflowError:
            return
        newest = self.saved[chosen[-1]]
        assert all(self.continues(newest, i) for i in chosen)

    @invariant()
    def nothing_else_is_there(self) -> None:
        assert set(complete_iterations(self.run) if self.run.exists() else ()) == set(self.saved)


COUNT = iter(range(10**9))


@pytest.mark.parametrize("budget", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_any_order_of_events(tmp_path: Path, budget: int) -> None:
    machine = type("Machine", (RunDirectory,), {"folder": tmp_path})
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine, settings=settings(max_examples=budget, stateful_step_count=25, deadline=None)
    )
