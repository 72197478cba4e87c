"""`kill_at` kills a process right before the operation that it names, and no other."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from tests.kill_points import kill_at


def work(folder: Path, note: Path, number: int, only: str) -> None:
    kill_at(folder, number, note, only)
    (folder.parent / "elsewhere").write_text("not counted")
    (folder / "made").mkdir()  # 1
    with open(folder / "a", "w") as file:  # 2
        file.flush()
        os.fsync(file.fileno())  # 3
    os.replace(folder / "a", folder / "b")  # 4
    (folder / "b").read_text()  # not counted
    if (child := os.fork()) == 0:
        (folder / "b").unlink()  # 5, in another process
        os._exit(0)
    os.waitpid(child, 0)
    (folder / "made").rmdir()  # 6
    os._exit(0)


@pytest.mark.parametrize(
    "number, only, killed, instant, left",
    [
        (1, "", True, "mkdir made", set()),
        (2, "", True, "open a", {"made"}),
        (3, "", True, "fsync a", {"made", "a"}),
        (4, "", True, "rename b", {"made", "a"}),
        (5, "", False, "remove b", {"b"}),  # the child alone is killed
        (6, "", True, "rmdir made", {"made"}),
        (1, "rename", True, "rename b", {"made", "a"}),
        (7, "", False, None, set()),
    ],
)
def test_a_process_is_killed_before_its_nth_operation(
    tmp_path: Path, number: int, only: str, killed: bool, instant: str | None, left: set[str]
) -> None:
    folder, note = tmp_path / "run", tmp_path / "note"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(
        target=work, args=(folder, note, number, only)
    )
    process.start()
    process.join(20)
    assert process.exitcode == (-9 if killed else 0)
    assert (note.read_text().strip() if note.exists() else None) == instant
    assert {path.name for path in folder.iterdir()} == left
