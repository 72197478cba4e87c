"""Why a job came down: said once, with rank, host and reason, whatever happened to the rank. Real processes."""

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
import os, sys, time
from megatron_chatflow.engine import cpu, distributed
from megatron_chatflow.engine.launch import read_launch
cpu.install()
import torch
from megatron_chatflow.config.settings import ParallelSettings
launch, what = read_launch(), sys.argv[1]
parallel = ParallelSettings(distributed_timeout_minutes=1)
import datetime, torch.distributed as dist
dist.init_process_group("gloo", init_method="env://", timeout=datetime.timedelta(seconds=8))
lifeline = distributed.watch(launch)
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
    lifeline.fail(error)
"""


def run(what: str, then: int | None) -> tuple[list[int], str, float]:
    """(exit codes, what was written to standard error, seconds from the fault to the end). `then`: a signal for rank 2 after it is up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, what], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, **pipes) for r in range(3)]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["up\n"] * 3
        time.sleep(1.5)
        begin = time.monotonic()
        if then is not None:
            ranks[2].send_signal(then)
        watched = ranks if then is None and what != "stuck" else ranks[:2]
        texts = [rank.communicate(timeout=60)[1] for rank in watched]
        return [rank.returncode for rank in watched], "".join(texts), time.monotonic() - begin
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "then", "sentence"),
    [
        ("raise", None, "rank 2 on {} failed: ValueError: the corpus is gone"),
        ("killed", signal.SIGKILL, "rank 2 on {} is gone: no sign of life"),
        ("stopped", signal.SIGSTOP, "rank 2 on {} is gone: no sign of life"),
        ("stuck", None, "rank 2 on {} is alive and did not come to a collective"),
    ],
)
def test_a_rank_that_fails_brings_the_job_down_within_a_minute_and_is_named(what: str, then: int | None, sentence: str) -> None:
    codes, text, seconds = run(what, then)
    assert set(codes) == {1} and seconds < 60, (codes, text)
    told = [line for line in text.splitlines() if line.startswith("chatflow: the job ends:")]
    before, after = sentence.split("{}")
    assert len(told) == 1 and before in told[0] and after in told[0] and socket.gethostname() in told[0], text
