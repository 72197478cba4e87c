"""Why a job came down: said once, with rank, host and reason, whatever happened to the rank. Real
processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import datetime, sys, time
from megatron_chatflow.distributed import cuda_shim, process_groups
from megatron_chatflow.distributed.launch import read_launch
cuda_shim.install()
import torch, torch.distributed as dist
launch, what = read_launch(), sys.argv[1]
store, monitor = process_groups._meet(launch, 60, None)
timeout = datetime.timedelta(seconds=int(sys.argv[2]))
sizes = {"rank": launch.rank, "world_size": launch.world_size}
dist.init_process_group("gloo", store=store, timeout=timeout, **sizes)
monitor.joined()
print("up", flush=True)
try:
    for i in range(10**6):
        if launch.rank == 2 and i == 20 and what == "raise":
            raise ValueError("the corpus is gone")
        if launch.rank == 2 and i == 20 and what == "stuck":
            time.sleep(1000)
        dist.all_reduce(torch.ones(4))
        time.sleep(0.02)
except Exception as error:
    monitor.fail(error)
"""


def run(
    what: str, then: int | None, who: int = 2, timeout: int = 8
) -> tuple[list[int], str, float]:
    """(exit codes of the others, what they wrote to standard error, seconds from the failure to the
    end).

    `then`: a signal for rank `who` after it is up. `timeout`: seconds that a collective may take.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, "-c", RANK, what, str(timeout)]
    ranks = [
        subprocess.Popen(words, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, **pipes)
        for r in range(3)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["up\n"] * 3
        time.sleep(1.5)
        begin = time.monotonic()
        if then is not None:
            ranks[who].send_signal(then)
        watched = (
            ranks
            if then is None and what != "stuck"
            else [rank for i, rank in enumerate(ranks) if i != who]
        )
        texts = [rank.communicate(timeout=90)[1] for rank in watched]
        return [rank.returncode for rank in watched], "".join(texts), time.monotonic() - begin
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "then", "sentence"),
    [
        ("raise", None, "rank 2 on {}, failed: ValueError: the corpus is gone"),
        ("killed", signal.SIGKILL, "rank 2 on {}, is gone: no heartbeat"),
        ("stopped", signal.SIGSTOP, "rank 2 on {}, is gone: no heartbeat"),
        ("stuck", None, "rank 2 on {}, is alive and did not come to a collective"),
    ],
)
def test_a_rank_that_fails_brings_the_job_down_within_a_minute_and_is_named(
    what: str, then: int | None, sentence: str
) -> None:
    codes, text, seconds = run(what, then)
    assert set(codes) == {1} and seconds < (13 if what == "killed" else 60), (codes, seconds, text)
    ends = [line for line in text.splitlines() if line.startswith("chatflow: the job ends:")]
    before, after = sentence.split("{}")
    assert "Traceback" not in text or what != "killed"
    assert (
        len(ends) == 1
        and before in ends[0]
        and after in ends[0]
        and socket.gethostname() in ends[0]
    ), text


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 2])
def test_a_stopped_rank_ends_the_job_within_a_minute_though_no_collective_fails(who: int) -> None:
    """Rank 0 holds the store: what asks it for anything waits, without a deadline."""
    codes, text, seconds = run("stopped", signal.SIGSTOP, who, timeout=600)
    assert codes == [1, 1] and seconds < 60, (codes, seconds, text)
    lines = [line for line in text.splitlines() if line.startswith("chatflow: the job ends:")]
    what = (
        "which holds the job's store, has not answered rank"
        if who == 0
        else "has given no heartbeat for 30 s"
    )
    assert len(lines) == (2 if who == 0 else 1), text
    assert all(
        f"rank {who} on {socket.gethostname()}, process " in line and what in line for line in lines
    ), text


@pytest.mark.slow
def test_rank_0_that_is_killed_is_named_by_the_others() -> None:
    codes, text, seconds = run("killed", signal.SIGKILL, 0)
    assert codes == [1, 1] and seconds < 60 and "Traceback" not in text, (codes, seconds, text)
    assert text.count(f"rank 0 on {socket.gethostname()}, process ") == 2, text
