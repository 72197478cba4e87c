"""Leaving before the end: all ranks after the same iteration, with a checkpoint, and nothing
lost.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from tests.pool import Pool
from tests.sample import metrics, train

TP = ["--tensor-model-parallel-size", "2"]
SHORT = ["--train-iters", "6", "--lr-decay-iters", "20", "--eval-interval", "2"]


@pytest.fixture(scope="module")
def uninterrupted(pool: Pool, sample: Path) -> Path:
    run = sample / "not stopped"
    results = pool.run(2, train, sample, "--save", str(run), *SHORT, *TP)
    assert {code for code, _, _ in results} == {0}, results
    return run


def train_and_signal(
    folder: Path, where: str, rank: int, number: int, *words: str
) -> tuple[int, str, str]:
    """`train`; one rank gets a signal when it does for the second time what `where` says."""
    from megatron_chatflow.checkpoint import saver
    from megatron_chatflow.training import train_loop, validation

    place = {
        "step": (train_loop, "train_step"),
        "validation": (validation, "evaluate_domains"),
        "save": (saver, "save_preprocess"),
        "publishing": (saver.Saver, "_end"),
    }[where]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    real, calls = getattr(*place), []

    def signalled(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2 and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        return real(*args, **kwargs)

    with mock.patch.object(*place, signalled):
        return train(folder, *words)


@pytest.mark.parametrize(
    ("where", "rank", "number", "iteration", "extra"),
    [
        pytest.param("step", 1, signal.SIGTERM, 2, [], marks=pytest.mark.slow),
        pytest.param("validation", 0, signal.SIGUSR1, 0, [], marks=pytest.mark.slow),
        pytest.param(
            "save", 1, signal.SIGTERM, 3, ["--save-interval", "1"], marks=pytest.mark.slow
        ),
        pytest.param(
            "publishing",
            0,
            signal.SIGUSR1,
            4,
            ["--save-interval", "1", "--async-save"],
            marks=pytest.mark.slow,
        ),
        pytest.param("step", 0, signal.SIGINT, 2, ["--ema-decay", "0.9"]),
        pytest.param("validation", 1, signal.SIGHUP, 0, [], marks=pytest.mark.slow),
    ],
)
def test_a_signal_at_any_moment_leaves_a_checkpoint(
    pool: Pool,
    sample: Path,
    uninterrupted: Path,
    where: str,
    rank: int,
    number: int,
    iteration: int,
    extra: list[str],
) -> None:
    run = sample / f"signal {where} {number}"
    words = ["--save", str(run), "--load", str(run), *SHORT, *TP, *extra]
    results = pool.run(2, train_and_signal, sample, where, rank, int(number), *words)
    assert [code for code, _, _ in results] == [3, 3], results
    name = signal.Signals(number).name
    assert f"({name}); resume with --load" in results[0][1], results
    left = int(results[0][1].split("exiting at iteration ")[1].split()[0])
    assert iteration <= left <= iteration + 2
    if left:
        assert (run / "latest_checkpointed_iteration.txt").read_text() == f"{left}\n"
    results = pool.run(2, train, sample, *words)
    assert {code for code, _, _ in results} == {0}, results
    assert (run / "metrics.jsonl").read_text().count('"validation"') == (
        uninterrupted / "metrics.jsonl"
    ).read_text().count('"validation"')
    assert metrics(run) == metrics(uninterrupted)


def test_a_run_leaves_when_its_minutes_are_over(pool: Pool, sample: Path) -> None:
    run = sample / "minutes"
    ((code, out, _),) = pool.run(
        1,
        train_with_fast_clock,
        sample,
        "--save",
        str(run),
        "--exit-duration-in-mins",
        "5",
        *SHORT[:4],
    )
    assert code == 3 and "exiting at iteration 2 (exit_duration_in_mins)" in out, out


def train_with_fast_clock(folder: Path, *words: str) -> tuple[int, str, str]:
    """`train` on a clock that gains two minutes whenever it is read."""
    from megatron_chatflow.training import signals

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            self.now += 120
            return self.now

    with mock.patch.object(signals, "time", Clock()):
        return train(folder, *words)


def test_signals_ignored_at_the_start_stay_ignored_and_others_are_given_back() -> None:
    from megatron_chatflow.training.signals import SIGNALS, StopRequest

    for ignored in ({signal.SIGHUP}, {signal.SIGINT}, set()):
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            for number in (signal.SIGHUP, signal.SIGINT):
                here = signal.SIG_IGN if number in ignored else signal.default_int_handler
                signal.signal(number, here)
            start = {number: signal.getsignal(number) for number in SIGNALS}
            for number in (signal.SIGHUP, signal.SIGINT):
                with StopRequest(None) as stop:
                    os.kill(os.getpid(), number)
                    end = time.monotonic() + (0.2 if number in ignored else 10)
                    while stop._signal is None and time.monotonic() < end:
                        time.sleep(0.01)
                    assert stop._signal == (None if number in ignored else number)
                assert start == {number: signal.getsignal(number) for number in SIGNALS}
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_process_at_once() -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "from megatron_chatflow.training.signals import StopRequest;"
    code += "s = StopRequest(None).__enter__();"
    code += "print('up', flush=True); [time.sleep(60) for _ in range(9)]"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 3
    finally:
        process.kill()


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_saves_and_exits(sample: Path, tmp_path: Path) -> None:
    """As under an ssh session that drops: writing to the terminal fails, and SIGHUP comes."""
    run = tmp_path / "run"
    words = ["train", "--config", str(sample / "run.yaml"), "--save", str(run)]
    words += ["--train-iters", "2000", "--lr-decay-iters", "20", "--log-interval", "1"]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", "megatron_chatflow", *words])
    text = ""
    while "iteration        3/" not in text:
        text += os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    iteration = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= iteration == len(metrics(run)) < 2000
    assert not list(run.glob("lease*"))


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK") if process.nice() < 19 else None
    except psutil.Error:
        return None


@pytest.mark.slow
def test_under_torchrun_the_others_say_that_rank_0_was_killed(sample: Path, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "megatron_chatflow", "train", "--config", str(sample / "run.yaml")]
    words += ["--train-iters", "2000", "--lr-decay-iters", "20", "--save", str(tmp_path / "run")]
    words += ["--log-interval", "1"]
    with open(tmp_path / "log", "wb") as log:
        job = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)
    try:
        while "iteration        3/" not in (tmp_path / "log").read_text():
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        ranks = psutil.Process(job.pid).children(recursive=True)
        (first,) = [rank for rank in ranks if rank_of(rank) == "0"]
        first.kill()
        assert job.wait(60) == 1
    finally:
        job.terminate()
        job.wait()
    text = (tmp_path / "log").read_text()
    reasons = [line for line in text.splitlines() if line.startswith("chatflow: the job ends: ")]
    assert len(reasons) == 1 and "is gone" in reasons[0], text
    assert "rank 0 on " in reasons[0] and f"process {first.pid}" in reasons[0], text


@pytest.mark.slow
def test_a_second_signal_ends_a_process_at_once_even_where_it_is_stuck() -> None:
    code = (
        "import ctypes, torch; from megatron_chatflow.training.signals import StopRequest; s = "
        "StopRequest(None).__enter__(); print('up', flush=True); "
    )
    code += "[ctypes.CDLL(None).sleep(60) for _ in range(9)]"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(3)
        assert process.poll() is None, "signals within three seconds are one"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(5) == 3
    finally:
        process.kill()
