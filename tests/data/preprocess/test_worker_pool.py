"""Worker processes of `preprocess` that are killed or stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_chatflow.data.preprocess import worker_pool
from megatron_chatflow.data.preprocess.encoder import EncodedChunk, EncodeTask
from megatron_chatflow.data.preprocess.input_files import Chunk
from megatron_chatflow.data.preprocess.worker_pool import WorkerDied, encoder_pool
from megatron_chatflow.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
TASK = EncodeTask("text", ("text",), None, False, None, "uint16")
BYTES = {"tokenizer_type": "ByteLevelTokenizer"}


def _chunks(count: int, size: int = 20):
    for number in range(1, count + 1):
        yield (
            0,
            Chunk(
                number,
                number + 1,
                json.dumps({"text": "x" * size}).encode() + b"\n",
                "jsonl",
                0,
                "",
            ),
        )


def _workers(others: set[psutil.Process]) -> set[psutil.Process]:
    """The worker processes: children whose command line is that of a spawned process."""
    children = set(psutil.Process().children()) - others
    return {process for process in children if "spawn_main" in " ".join(process.cmdline())}


@pytest.fixture
def signalled(monkeypatch):
    """A function: signal, chunks -> what `encode` gives when the workers get the signal."""
    monkeypatch.setattr(worker_pool, "STOPPED_SECONDS", 2)
    others = set(psutil.Process().children())

    def run(number: int, chunks) -> list[EncodedChunk]:
        sent = []

        def watched():
            for source, chunk in chunks:
                if not sent and (found := _workers(others)):
                    sent.extend(found)
                    for process in found:
                        process.send_signal(number)
                yield source, chunk

        with encoder_pool(2, load_tokenizer(**BYTES), BYTES, TASK) as encode:
            result = [encoded for _, encoded in encode(watched(), lambda: False)]
        assert sent
        return result

    yield run
    assert _workers(others) == set()


def test_a_stopped_worker_ends_the_run_and_is_named(signalled):
    began = time.monotonic()
    with pytest.raises(
        WorkerDied, match=r"worker process \d+ is stopped \(SIGSTOP\) for 2 s: .*kill -CONT"
    ):
        signalled(signal.SIGSTOP, _chunks(100))
    assert time.monotonic() - began < 20


def test_a_stopped_worker_that_a_large_chunk_is_written_to_ends_the_run(signalled):
    with pytest.raises(WorkerDied, match="is stopped"):
        signalled(signal.SIGSTOP, _chunks(4, 1_000_000))


def test_a_killed_worker_ends_the_run(signalled):
    with pytest.raises(WorkerDied, match="a worker process was killed: look for a lack of memory"):
        signalled(signal.SIGKILL, _chunks(100))


def test_a_worker_that_is_stopped_when_all_is_done_does_not_hold_up_the_end(monkeypatch):
    others = set(psutil.Process().children())
    with encoder_pool(2, load_tokenizer(**BYTES), BYTES, TASK) as encode:
        assert len(list(encode(_chunks(20), lambda: False))) == 20
        for process in _workers(others):
            process.send_signal(signal.SIGSTOP)
    assert _workers(others) == set()


@pytest.mark.slow
def test_a_stopped_worker_ends_the_command_with_what_to_do_and_a_slow_one_does_not(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        for _ in range(12):
            file.write(json.dumps({"text": "free and equal " * 70_000}) + "\n")
    command = [
        sys.executable,
        ROOT / "tools" / "preprocess_data.py",
        "--input",
        "a.jsonl",
        "--output-prefix",
        "out/x",
        "--workers",
        "2",
    ]
    command += [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        ROOT / "examples" / "quickstart" / "tokenizer.model",
    ]
    process = psutil.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (
        found := [
            child for child in process.children() if "spawn_main" in " ".join(child.cmdline())
        ]
    ):
        time.sleep(0.1)
    os.kill(found[0].pid, signal.SIGSTOP)
    _, message = process.communicate(timeout=100)
    assert (
        process.returncode == 1
        and f"worker process {found[0].pid} is stopped" in message
        and "Traceback" not in message
    )
    subprocess.run(
        [*command, "--resume"], cwd=tmp_path, check=True, capture_output=True, timeout=100
    )
    assert (tmp_path / "out" / "x_text_document.idx").exists()
