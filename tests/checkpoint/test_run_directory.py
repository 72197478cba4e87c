"""Damaged pointers of a run directory are messages, and any order of events keeps it valid."""

from __future__ import annotations

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
    outdated_on_course,
)
from megatron_chatflow.checkpoint.selection import choose_weights
from megatron_chatflow.errors import ChatflowError
from tests.checkpoint.run_folders import write_checkpoint

ROOT = Lineage("root")


def numbers(folders: Any) -> list[int]:
    return [int(folder.name[5:]) for folder in folders]


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
        """The history of the current run, or of its last checkpoint."""
        self.saved: dict[int, list[int]] = {}
        self.broken: set[int] = set()
        self.pointer_is_intact = self.course_is_intact = True

    @initialize()
    def start(self) -> None:
        self.run.mkdir()
        self.course, notes = begin_course(self.run, None, 0)
        assert not notes
        self.advance(4)
        self.save(2, None)

    def advance(self, iterations: int) -> None:
        self.history = [*self.history, *[self.launch] * iterations]

    @rule(iterations=st.integers(1, 5))
    def train(self, iterations: int) -> None:
        self.advance(iterations)

    @rule(keep=st.none() | st.integers(1, 3), interval=st.none() | st.integers(2, 5))
    def save(self, keep: int | None, interval: int | None) -> None:
        iteration = len(self.history)
        if iteration == self.begun:  # a run does not save what it continues from
            return
        self.write(iteration, pointed=True)
        self.pointer_is_intact = True
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
        before = latest_iteration(self.run) if self.pointer_is_intact else None
        if before is None:
            return
        self.advance(iterations)
        self.write(len(self.history), pointed=False)
        self.history = self.saved[before]
        self.resume()

    @rule()
    def resume(self) -> None:
        pointed = latest_iteration(self.run) if self.pointer_is_intact else None
        before = self.saved.get(pointed) if pointed is not None else None
        knows = before is not None and (self.course_is_intact or pointed not in self.broken)
        try:
            found, notes = find_intact_checkpoint(self.run, None, {})
        except ChatflowError:
            intact = [
                i
                for i in self.saved
                if i not in self.broken and before and self.continues(before, i)
            ]
            assert not knows or not intact
            return
        iteration = int(found.name[5:])
        assert iteration not in self.broken
        if knows:
            intact = [i for i in self.saved if i <= pointed and i not in self.broken]
            assert iteration == max(i for i in intact if self.continues(before, i))
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
        self.pointer_is_intact = self.course_is_intact = True
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
        self.pointer_is_intact = False

    @rule()
    def lose_the_course(self) -> None:
        (self.run / lineage.FILE).unlink(missing_ok=True)
        self.course_is_intact = False

    @precondition(lambda self: self.pointer_is_intact)
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
