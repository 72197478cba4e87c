"""Processes that do not become one job end within the deadline, and say who came and what is wrong.
Real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.distributed.sockets import line, parse

RANK = """
import sys
from megatron_chatflow.distributed.launch import LaunchError, read_launch
from megatron_chatflow.distributed.rendezvous import rendezvous
assert not {"torch", "numpy"} & set(sys.modules)
launch = read_launch()
print("begins", flush=True)
for _ in range(int(sys.argv[2])):
    try:
        met = rendezvous(launch, float(sys.argv[1]), lambda: 7)
        print("met", met.port, "; ".join(met.names), flush=True)
    except LaunchError as error:
        print("error", error.exit_code, error)
        sys.exit(error.exit_code)
if launch.rank == 0:
    sys.stdin.read()
"""
HOST = socket.gethostname()


class Job:
    """Processes that meet at a port of their own."""

    def __init__(self) -> None:
        self.port, self.began = free_port(), time.monotonic()
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, rank: int, size: int, *, seconds: float = 2, times: int = 1, **env: str) -> Any:
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.port, "PYTHONPATH": Path(__file__).parents[2],
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(seconds), str(times)],
            env=os.environ | {key: str(value) for key, value in variables.items()} | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def answers(self, *processes: Any, limit: float = 30) -> list[str]:
        """What each process, by default every one, printed last; all end within `limit` seconds."""
        found = [p.communicate("", timeout=limit)[0] for p in processes or self.processes]
        return [text.strip().split("\n")[-1] for text in found]


@pytest.fixture
def job() -> Iterator[Job]:
    it = Job()
    yield it
    for process in it.processes:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def begun(process: Any) -> Any:
    assert process.stdout.readline() == "begins\n"
    return process


def test_all_processes_meet_and_know_each_other(job: Job) -> None:
    processes = [job.start(rank, 3, seconds=20) for rank in (2, 0, 1)]
    with socket.socket() as stray:  # a port scanner, say; it does not answer
        while stray.connect_ex(("127.0.0.1", job.port)):
            time.sleep(0.01)
        answers = set(job.answers())
    names = "; ".join(f"rank {r} on {HOST}, process {processes[r - 2].pid}" for r in (0, 1, 2))
    assert answers == {f"met 7 {names}"}


def test_processes_meet_again_at_the_same_port(job: Job) -> None:
    for rank in (0, 1):
        job.start(rank, 2, seconds=20, times=5)
    assert all(answer.startswith("met 7") for answer in job.answers())


def test_who_came_and_who_did_not_is_named_everywhere(job: Job) -> None:
    for rank in (0, 2, 3, 7):
        job.start(rank, 9)
    answers = set(job.answers())
    assert len(answers) == 1, answers
    (answer,) = answers
    assert answer.startswith("error 1 4 of 9 processes came within 2 s: rank 0 on ")
    for process, rank in zip(job.processes, (0, 2, 3, 7), strict=True):
        assert f"rank {rank} on {HOST}, process {process.pid}" in answer
    assert "ranks 1, 4 to 6, 8 did not; start all of them" in answer


def test_the_process_that_waits_longest_ends_the_meeting(job: Job) -> None:
    first = begun(job.start(1, 3, seconds=3))
    time.sleep(1.5)
    late = begun(job.start(0, 3, seconds=60))
    assert ["2 of 3 processes came" in answer for answer in job.answers(first, late)] == [True] * 2


def test_a_process_alone_says_that_nobody_listens(job: Job) -> None:
    job.start(1, 2)
    (answer,) = job.answers()
    assert answer.startswith("error 1 rank 1 on ") and "did not find rank 0 within 2 s" in answer
    assert f"MASTER_ADDR 127.0.0.1, MASTER_PORT {job.port}: nobody listens there" in answer


def test_an_unknown_address_is_named_by_all(job: Job) -> None:
    for rank in (0, 1):
        job.start(rank, 2, MASTER_ADDR="no-such-host.invalid")
    first, second = job.answers()
    assert "1 of 2 processes came" in first and "rank 1 did not" in first
    assert "MASTER_ADDR no-such-host.invalid is not known on this host" in first
    assert "no-such-host.invalid is not known on this host" in second


def test_an_address_of_another_host_is_reported_by_rank_0(job: Job) -> None:
    job.start(0, 2, MASTER_ADDR="192.0.2.1")
    (answer,) = job.answers()
    assert "MASTER_ADDR 192.0.2.1 is 192.0.2.1, which is not an address of this host" in answer


@pytest.mark.parametrize(
    ("env", "refused"),
    [
        (
            {0: {}, 1: {"WORLD_SIZE": "3"}},
            "WORLD_SIZE is 2 in rank 0 on {}, process {} and 3 in rank 1 on {}, process {}; ",
        ),
        (
            {0: {"WORLD_SIZE": "4"}, 1: {}},
            "WORLD_SIZE is 4 in rank 0 on {}, process {} and 2 in rank 1 on {}, process {}; ",
        ),
    ],
)
def test_different_sizes_are_refused_at_once(job: Job, env: Any, refused: str) -> None:
    a, b = (job.start(rank, 2, seconds=60, **env[rank]) for rank in (0, 1))
    expected = refused.format(HOST, a.pid, HOST, b.pid)
    assert all(answer.startswith(f"error 2 {expected}") for answer in job.answers())


def test_a_rank_that_comes_twice_is_refused_at_once(job: Job) -> None:
    for rank in (1, 1, 0):
        job.start(rank, 3, seconds=60)
    answers = set(job.answers())
    assert len(answers) == 1 and "error 2 two processes have RANK 1: rank 1 on" in answers.pop()


def test_two_processes_of_rank_0_are_refused_at_once(job: Job) -> None:
    first = begun(job.start(0, 2, seconds=60))
    while socket.socket().connect_ex(("127.0.0.1", job.port)):
        time.sleep(0.05)
    second = job.start(0, 2, seconds=60)
    answers = job.answers()
    assert answers[0] == answers[1]
    assert (
        f"two processes have RANK 0: rank 0 on {HOST}, process {first.pid}, and rank 0"
        in answers[0]
    )
    assert f"process {second.pid};" in answers[0]


def test_a_port_of_another_run_is_reported_with_its_process(job: Job) -> None:
    run = [job.start(rank, 2, seconds=20) for rank in (0, 1)]
    assert job.answers(run[1])[0].startswith("met 7")
    others = [job.start(rank, 2, seconds=60) for rank in (0, 1)]
    for answer in job.answers(*others):
        assert answer.startswith("error 2 rank ") and "is in use by another run" in answer
        assert f"rank 0 on {HOST}, process {run[0].pid} holds it" in answer


def serve(port: int, talk: Callable[[socket.socket], None]) -> socket.socket:
    """Another program that has the port."""
    listener = socket.create_server(("127.0.0.1", port))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                talk(connection)
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    return listener


def drip(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x")
        time.sleep(0.2)


TALKS: dict[str, Callable[[socket.socket], Any]] = {
    "silent": lambda connection: KEPT.append(connection),
    "ssh": lambda connection: (connection.sendall(b"SSH-2.0-x\r\n"), KEPT.append(connection)),
    "closes": lambda connection: connection.close(),
    "drips": drip,
    "floods": lambda connection: connection.sendall(b"x" * 10_000_000),
}
KEPT: list[socket.socket] = []


@pytest.mark.parametrize("talk", TALKS)
def test_a_port_of_another_program_is_reported_by_all(job: Job, talk: str) -> None:
    with serve(job.port, TALKS[talk]):
        for rank in (0, 1):
            job.start(rank, 2)
        first, second = job.answers()
    KEPT.clear()
    assert first.startswith("error 2 rank 0 on "), first
    assert f"MASTER_PORT {job.port} is in use by another program" in first
    assert (
        second.startswith("error ")
        and "in use by another program, or" in second
        or (second.startswith("error 2 ") and "in use by another program; set another" in second)
    )


def test_a_process_that_comes_and_dies_ends_the_meeting(job: Job) -> None:
    host = begun(job.start(0, 3, seconds=60))
    said = {"rank": 1, "world_size": 3, "host": "n7", "pid": 123, "gpu": None, "left": 60}
    with socket.socket() as other:
        while other.connect_ex(("127.0.0.1", job.port)):
            time.sleep(0.05)
        other.sendall(line(said))
        assert parse(other.recv(4096))["over"] is False
    (answer,) = job.answers(host)
    came = "rank 1 on n7, process 123 came and exited before all processes had come"
    assert answer == f"error 1 {came}; see what it printed"


def test_two_processes_on_one_gpu_are_refused(job: Job) -> None:
    host = begun(job.start(0, 3, seconds=60))
    said = {"world_size": 3, "host": "n7", "gpu": "GPU-1", "left": 60}
    with socket.socket() as one, socket.socket() as two:
        for rank, other in enumerate((one, two), start=1):
            while other.connect_ex(("127.0.0.1", job.port)):
                time.sleep(0.05)
            other.sendall(line(said | {"rank": rank, "pid": rank}))
        (answer,) = job.answers(host)
    assert answer.startswith("error 2 rank 1 on n7, process 1, and rank 2 on n7, process 2 use")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0_that_dies_or_stops_ends_the_meeting(job: Job, number: signal.Signals) -> None:
    host = job.start(0, 3, seconds=60)
    while socket.socket().connect_ex(("127.0.0.1", job.port)):
        time.sleep(0.05)
    other = begun(job.start(1, 3, seconds=3))
    time.sleep(1)
    host.send_signal(number)
    (answer,) = job.answers(other)
    what = "exited before all processes had come" if number == signal.SIGKILL else "does not answer"
    assert answer.startswith(f"error 1 rank 0 on {HOST}, process {host.pid} {what}"), answer
