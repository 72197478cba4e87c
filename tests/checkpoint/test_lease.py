"""One run per run directory: real processes race, are killed or stopped, and lose their lease."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest

from megatron_chatflow.checkpoint import lease as module
from megatron_chatflow.checkpoint.lease import Lease, LeaseLostError
from megatron_chatflow.checkpoint.lease_holder import Holder
from megatron_chatflow.errors import ChatflowError
from tests.pool import Pool
from tests.sample import metrics, train

LOCKS = [pytest.param(True, id="locks"), pytest.param(False, id="no locks")]


def without_locks(*_: object) -> None:
    """`fcntl.flock` of a file system that has no locks, such as Lustre mounted without them."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=LOCKS)
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the file system's locks, and without: forked children inherit which."""
    if not request.param:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    return request.param


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks faster: a heartbeat of 0.2 s, old after 2 s."""
    for name, seconds in {"BEAT": 0.2, "DEAD": 2.0, "WATCH": 0.6, "PATIENCE": 1.0}.items():
        monkeypatch.setattr(module, name, seconds)


@contextmanager
def child(work: Callable[[], object]) -> Iterator[tuple[int, int]]:
    """(process, pipe to read): a forked process that does `work`, then waits to be killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = b"held"
        try:
            work()
        except BaseException as error:
            answer = str(error).encode()
        os.write(write, answer)
        signal.pause()
        os._exit(0)
    os.close(write)
    try:
        yield pid, read
    finally:
        os.close(read)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def answer(read: int) -> str:
    return os.read(read, 1 << 16).decode()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def leases(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record(folder: Path, number: int = 1, *, age: float = 0.0, **changes: object) -> Path:
    """A lease that is left of a process on another machine, or of what `changes` say."""
    holder = Holder.this_process(locks=True)
    holder = dataclasses.replace(holder, host="node7", boot="another", pid=77, job="4711")
    path = folder / f"lease-{number}.json"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(holder, **changes))))
    os.utime(path, ns=(0, time.time_ns() - int(age * 1e9)))
    return path


def test_of_many_processes_that_start_at_once_exactly_one_gets_the_lease(
    tmp_path: Path, locks: bool
) -> None:
    for trial in range(12):
        folder = tmp_path / f"run{trial}"
        if trial % 2:  # after a dead holder
            with child(Lease(folder).acquire) as (pid, read):
                assert answer(read) == "held"
                kill(pid)
        start = time.time() + 0.05

        def work(folder: Path = folder, start: float = start) -> None:
            time.sleep(max(0.0, start - time.time()))
            Lease(folder).acquire()

        with child(work) as a, child(work) as b, child(work) as c:
            answers = sorted(answer(read) for _, read in (a, b, c))
            assert answers.count("held") == 1, answers
            refusals = [text for text in answers if text != "held"]
            assert all("another process writes there" in text for text in refusals), answers
            assert len(leases(folder)) == 1


def test_the_second_run_reads_who_holds_the_folder_and_since_when(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    with child(Lease(tmp_path).acquire) as (pid, read):
        assert answer(read) == "held"
        begin = time.monotonic()
        with Lease(tmp_path) as second, pytest.raises(ChatflowError) as refused:
            second.acquire()
        assert time.monotonic() - begin < 1
        text = str(refused.value)
        assert f"on {os.uname().nodename}, process {pid}, SLURM job 123, since 20" in text
        assert text.startswith(f"save {tmp_path}: another process writes there: ")
        assert text.endswith("wait until it ends, stop it, or give --save another folder")
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)
        with pytest.raises(ChatflowError, match=f"is stopped, `kill -CONT {pid}` resumes it"):
            Lease(tmp_path).acquire()
        kill(pid)
        begin = time.monotonic()
        with Lease(tmp_path) as third:
            third.acquire()
            assert time.monotonic() - begin < 1
            assert leases(tmp_path) == ["lease-2.json"]
    assert leases(tmp_path) == []


def test_a_process_that_outlives_its_parent_does_not_keep_the_lease(tmp_path: Path) -> None:
    def work() -> None:
        Lease(tmp_path).acquire()
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"], close_fds=False)

    with child(work) as (pid, read):
        assert answer(read) == "held"
        kill(pid)
        with Lease(tmp_path) as lease:
            lease.acquire()


def test_a_lock_whose_process_has_ended_is_waited_for(tmp_path: Path, quick: None) -> None:
    lease = Lease(tmp_path)
    lease.acquire()
    path = tmp_path / "lease-1.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"pid": 2**22 + 1}))
    with pytest.raises(ChatflowError, match="the process has ended, but its lock is still held"):
        Lease(tmp_path).acquire()
    os.close(lease._file)
    with Lease(tmp_path) as other:
        other.acquire()


def test_the_number_of_a_dead_process_may_be_another_ones_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    me = Holder.this_process(locks=False)
    record(tmp_path, boot=me.boot, pid=me.pid, started=me.started, locks=False)
    with pytest.raises(ChatflowError, match="another process writes there"):
        Lease(tmp_path).acquire()
    record(tmp_path, boot=me.boot, pid=me.pid, started=me.started - 1, locks=False)
    with Lease(tmp_path) as lease:
        lease.acquire()


def test_a_heartbeat_of_another_machine_decides_by_the_clock_of_the_file_system(
    tmp_path: Path, locks: bool, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's clock has no say
    path = record(tmp_path, since=1.0)

    def beat() -> None:
        while True:
            time.sleep(0.2)
            os.utime(path)

    with child(beat):
        with Lease(tmp_path) as lease, pytest.raises(ChatflowError) as refused:
            lease.acquire()
        assert "on node7, process 77, SLURM job 4711" in str(refused.value)
    os.utime(path)
    begin, said = time.monotonic(), []
    with Lease(tmp_path) as lease:
        with mock.patch.object(module.logger, "info", said.append):
            lease.acquire()
        assert 1.5 < time.monotonic() - begin < 10, "it waits until the heartbeat is old"
        assert leases(tmp_path) == ["lease-2.json"]
    assert len(said) == 1 and "held by" in said[0] and "waiting up to 2 s for another" in said[0]
    record(tmp_path, since=1.0).rename(path)
    os.utime(path, (0, 1))
    begin = time.monotonic()
    with Lease(tmp_path) as lease:
        lease.acquire()
        assert 0.6 <= time.monotonic() - begin < 1.9, "an old one is watched for a moment"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "\0" * 300, '{"token": 1}', '{"pid": "x", "token": [], "since": 1e999}'],
)
def test_a_damaged_lease_is_taken_over_when_nothing_renews_it(
    tmp_path: Path, quick: None, content: str
) -> None:
    path = tmp_path / "lease-41.json"
    path.write_text(content)
    os.utime(path, (0, 0))
    with Lease(tmp_path) as lease:
        lease.acquire()
        assert leases(tmp_path) == ["lease-42.json"]


def test_a_holder_notices_that_its_lease_was_removed(tmp_path: Path, quick: None) -> None:
    with Lease(tmp_path / "run") as lease:
        lease.acquire()
        lease.check()
        (tmp_path / "run" / "lease-1.json").unlink()
        end = time.monotonic() + 5
        while not lease.lost and time.monotonic() < end:
            time.sleep(0.05)
        assert lease.lost, "the thread looks, too"
        with pytest.raises(LeaseLostError, match=r"its lease lease-1.json was removed"):
            lease.check()
    assert not (tmp_path / "run").exists()


def test_a_stopped_holder_whose_lease_was_taken_over_does_not_continue(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    first = Lease(tmp_path)
    first.acquire()
    first._closed.set()  # its heartbeat ends, as under SIGSTOP
    first._thread.join()
    content = json.loads((tmp_path / "lease-1.json").read_text())
    (tmp_path / "lease-1.json").write_text(json.dumps(content | {"boot": "another"}))
    with child(Lease(tmp_path).acquire) as (pid, read):
        assert answer(read) == "held"
        assert not first.holds()
        with pytest.raises(LeaseLostError, match=f"taken over by .*, process {pid}, since"):
            first.check()
        first.release()
        assert leases(tmp_path) == ["lease-2.json"], "the other's lease stays"


def test_a_lease_of_the_same_number_is_not_mistaken_for_ones_own(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        lease.acquire()
        (tmp_path / "lease-1.json").unlink()
        with Lease(tmp_path) as other:
            other.acquire()
            with pytest.raises(LeaseLostError):
                lease.check()
            lease.release()
            other.check()


def test_a_lease_leaves_no_trace_unless_something_was_written(tmp_path: Path) -> None:
    for write in (False, True):
        folder = tmp_path / "a" / "b" / "run"
        with Lease(folder) as lease:
            lease.acquire()
            if write:
                (folder / "config.yaml").touch()
        assert (tmp_path / "a").exists() == write


def alone(folder: Path, *words: str) -> tuple[int, str, str]:
    """`train` as one process, on whichever rank of the pool."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        return train(folder, *words)
    finally:
        os.environ |= dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"), "0")
        os.environ["MASTER_PORT"] = "0"


def test_of_two_runs_in_one_directory_the_second_is_refused(pool: Pool, sample: Path) -> None:
    run = sample / "two runs"
    words = ["--save", str(run), "--load", str(run), "--save-interval", "2", "--train-iters", "6"]
    words += ["--lr-decay-iters", "20", "--async-save", "--most-recent-k", "2"]
    results = pool.run(2, alone, sample, *words)
    codes = sorted(code for code, _, _ in results)
    assert codes == [0, 2], results
    (error,) = (err for code, _, err in results if code)
    assert "another process writes there" in error and "Traceback" not in error
    assert [r["iteration"] for r in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert not list(run.glob("lease-*"))


def train_and_lose(folder: Path, run: str, *words: str) -> tuple[int, str, str]:
    """`train`; rank 0 loses its lease when its second checkpoint is about to be published."""
    from unittest import mock

    from megatron_chatflow.checkpoint import saver

    real, calls = saver.write_manifest, []

    def robbed(*args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            (Path(run) / "lease-1.json").unlink()
        real(*args)

    with mock.patch.object(saver, "write_manifest", robbed):
        return train(folder, "--save", run, *words)


def test_a_run_that_lost_its_directory_publishes_nothing(pool: Pool, sample: Path) -> None:
    run = sample / "lost"
    words = ["--save-interval", "2", "--train-iters", "8", "--lr-decay-iters", "20"]
    results = pool.run(2, train_and_lose, sample, str(run), *words)
    assert [code for code, _, _ in results] == [1, 1], results
    assert (
        "this run no longer holds the folder: its lease lease-1.json was removed" in results[0][2]
    )
    assert (
        results[0][2].count("\n") == 1 and results[1][2] == "" and "Traceback" not in results[0][1]
    )
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000002"]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    assert [r["iteration"] for r in metrics(run)] == [1, 2, 3, 4]
