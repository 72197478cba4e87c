"""What a run cannot write when it starts is one message on rank 0, and one exit code on all
ranks.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_chatflow.distributed.launch import node_name
from tests.chaos_faults import small_disk
from tests.pool import Pool
from tests.sample import train

SHORT = ["--train-iters", "2", "--lr-decay-iters", "20"]


def refused(pool: Pool, sample: Path, code: int, *words: str) -> str:
    """The message of a run on two ranks that ends with `code`."""
    results = pool.run(2, train, sample, *SHORT, *words)
    assert [result[0] for result in results] == [code, code], results
    message = results[0][2].removesuffix("\n")
    # Without a launcher, as here, every process reports what it refuses.
    same = results[0][2].replace("chatflow train:", f"chatflow train on {node_name()}:")
    assert "\n" not in message and results[1][2] in ("", same), results
    assert "Traceback" not in results[0][1] + results[1][1]
    return message.removeprefix("chatflow train: ")


def test_a_path_that_cannot_be_a_run_directory_is_exit_code_2(pool: Pool, sample: Path) -> None:
    (sample / "file").write_text("")
    where = sample / "file" / "run"
    message = refused(pool, sample, 2, "--save", str(where))
    assert message.startswith(f"error: save {where}: cannot write") and "Not a directory" in message
    assert message.endswith("give --save a folder that this user can write to")
    long = sample / ("x" * 300)
    assert "File name too long" in refused(pool, sample, 2, "--save", str(long))


def test_logs_that_cannot_be_opened_are_exit_code_2(pool: Pool, sample: Path) -> None:
    (sample / "file").write_text("")
    run, board = sample / "unwritable", sample / "file" / "board"
    message = refused(pool, sample, 2, "--save", str(run), "--tensorboard-dir", str(board))
    assert message.startswith(f"error: tensorboard_dir {board}: cannot write")
    assert message.endswith("give --tensorboard-dir a folder that this user can write to")
    assert not run.exists()
    (run / "metrics.jsonl").mkdir(parents=True)
    message = refused(pool, sample, 2, "--save", str(run))
    assert f"cannot write {run / 'metrics.jsonl'} (Is a directory)" in message


def test_a_read_only_disk_is_exit_code_2_and_a_full_one_exit_code_1(
    pool: Pool, sample: Path
) -> None:
    with small_disk(24) as (disk, mounted):
        if not mounted:
            pytest.skip("a tmpfs cannot be mounted here (not root?)")
        run = disk / "run"
        full = (
            "(No space left on device); free space on the disk, then start the same command again"
        )
        for free in (0, 2):  # in pages: for nothing, for the lease and TensorBoard's log
            with open(disk / "filler", "wb", buffering=0) as file:
                stat = os.statvfs(disk)
                file.write(b"\0" * (stat.f_bavail - free) * stat.f_frsize)
            message = refused(pool, sample, 1, "--save", str(run))
            assert message.startswith(f"stopped: save {run}: cannot write") and full in message
            assert not list(disk.glob("run/lease*")) and not list(disk.glob("run/.*"))
            (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        message = refused(pool, sample, 2, "--save", str(disk / "other"))
        assert "Read-only file system" in message
        message = refused(pool, sample, 2, "--save", str(run))
        assert "Read-only file system" in message
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert {code for code, _, _ in pool.run(2, train, sample, *SHORT, "--save", str(run))} == {
            0
        }
