"""`chatflow train` whose processes do not become one job: real processes from the shell."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "code", "message"),
    [
        ([0], 1, "1 of 2 processes came within 20 s: rank 0 on {}, process {}; rank 1 did not; "),
        ([0, 0], 2, "two processes have RANK 0: rank 0 on "),
        ([1], 1, "rank 1 on {}, process {} did not find rank 0 within 20 s at MASTER_ADDR 127"),
    ],
)
def test_every_process_ends_with_one_message_and_no_traceback(
    sample: Path, ranks: list[int], code: int, message: str
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "megatron_chatflow", "train", "--config", sample / "run.yaml"]
    processes = [
        subprocess.Popen(
            [*words, "--init-timeout", "20"],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=180)
            errors = [line for line in err.splitlines() if "error:" in line]
            assert process.returncode == code and len(errors) == 1 and "Traceback" not in err, err
            assert message.format(socket.gethostname(), process.pid) in errors[0], err
    finally:
        for process in processes:
            process.kill()
            process.wait()
