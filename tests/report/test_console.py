"""The console where it is gone, and commands that are interrupted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.pool import command

LOSSY = """
import os, sys
from megatron_chatflow.report import console
print("before", end="", flush=True)
with console.lossy_output():
    for i in range(3000):
        print("a line that nobody reads", flush=i % 2 == 0)
        console.complain("neither this one")
"""


def test_output_that_nobody_can_read_does_not_end_a_program() -> None:
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", LOSSY], stdout=write, stderr=write)
    os.close(write)
    assert os.read(read, 6) == b"before"
    os.close(read)
    assert process.wait(30) == 0


def test_lines_that_a_full_disk_does_not_take_are_dropped() -> None:
    with open("/dev/full", "wb") as full:
        code = LOSSY.replace('print("before", end="", flush=True)', "") + "os._exit(0)"
        assert (
            subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full).returncode == 0
        )


def test_an_interrupted_command_gives_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_chatflow.cli import plan

    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "main", interrupted)
    assert command("plan") == (130, "", "chatflow plan: interrupted\n")
