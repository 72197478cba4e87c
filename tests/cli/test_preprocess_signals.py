"""tools/preprocess_data.py at signals, and when one of its processes is killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_chatflow.cli.preprocess import main
from megatron_chatflow.data import IndexedDataset
from tests.cli.preprocess_tool import LINE, arguments, command, run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE * 3)
    return tmp_path


def _restore_default_signals():
    """A shell starts what it puts into the background with Ctrl-C ignored, and children inherit
    that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def started(tmp_path):
    """The tool with two processes, fed by hand through its standard input until both are at
    work.
    """
    arguments = (
        "--input",
        "-",
        "--output-prefix",
        "out/a",
        "--tokenizer-type",
        "ByteLevelTokenizer",
        "--workers",
        "2",
    )
    process = subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_restore_default_signals,
    )
    process.stdin.write(LINE * 3000)
    process.stdin.flush()
    yield process
    for child in children(process):
        child.kill()
    process.kill()
    process.wait()
    process.stdin.close()
    process.stderr.close()


def children(process):
    try:
        return [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())
        ]
    except psutil.NoSuchProcess:
        return []


def wait_for_worker(process):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if workers := children(process):
            return workers[0]
        time.sleep(0.02)
    raise AssertionError("no worker was started")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_run_leaves_nothing_and_no_process(started, tmp_path, number, code):
    worker = wait_for_worker(started)
    if number != signal.SIGTERM:
        os.killpg(started.pid, number)  # as Ctrl-C does, and a terminal that goes
    else:
        started.send_signal(number)
    assert started.wait(20) == code
    found = started.stderr.read().decode()
    if found == "preprocess_data.py: interrupted; nothing was written: run the command again\n":
        assert list(tmp_path.iterdir()) == []
    else:  # on a slow machine the first state is saved already
        kept = "out/a_text_document.unfinished"
        assert found == (
            f"preprocess_data.py: interrupted; what is done is kept in {kept}: the same "
            f"command with --resume continues from there\n"
        )
        assert [path.name for path in (tmp_path / "out").iterdir()] == [
            "a_text_document.unfinished"
        ]
    worker.wait(10)


def test_signals_are_the_callers_again_when_the_command_returns(folder, monkeypatch):
    monkeypatch.chdir(folder)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    for more, code in (([], 0), (["--workers", "two"], 2)):
        assert main(arguments("--workers", "1", *more)) == code
        assert [signal.getsignal(number) for number in numbers] == before
    answers = []
    thread = threading.Thread(target=lambda: answers.append(main(arguments("--workers", "1"))))
    thread.start()
    thread.join()
    assert answers == [0]


def test_nohup_and_a_terminal_that_is_gone_do_not_end_a_run(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE * 3000)
    code = "import os, signal, sys, time; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
    code += "os.kill(os.getpid(), signal.SIGHUP);"
    code += "from megatron_chatflow.cli import preprocess as command;"
    code += "from megatron_chatflow.data.preprocess import pipeline as preprocess;"
    code += "real = preprocess.publish_corpus;"
    code += (
        "preprocess.publish_corpus = lambda *a: (os.kill(os.getpid(), signal.SIGHUP), real(*a));"
    )
    code += f"sys.exit(command.main({[*arguments('--workers', '1')]}))"
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=write, stderr=write)
    os.close(write)
    assert result.returncode == 0
    assert (tmp_path / "out" / "a_text_document.idx").exists()


def test_a_second_interrupt_ends_the_command_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE * 3)
    code = "import os, signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "from megatron_chatflow.cli import preprocess as command;"
    code += "from megatron_chatflow.data.preprocess import pipeline as preprocess;"
    code += "end = lambda *a: os.kill(os.getpid(), signal.SIGINT);"
    code += "preprocess.discard_state = lambda *a: (end(), time.sleep(60));"
    code += "preprocess.publish_corpus = end;"
    code += "import megatron_chatflow.data.preprocess.resume_state as unfinished;"
    code += "unfinished._remove = lambda *a: (end(), time.sleep(60));"
    code += f"sys.exit(command.main({[*arguments('--workers', '1')]}))"
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert result.returncode == 130 and time.monotonic() - begin < 30, result.stderr
    assert b"Traceback" not in result.stderr


def test_a_killed_worker_is_exit_code_1_and_leaves_no_corpus(started, tmp_path):
    wait_for_worker(started).kill()
    try:
        for _ in range(20):
            started.stdin.write(LINE * 1000)
            started.stdin.flush()
    except BrokenPipeError:
        pass
    assert started.wait(20) == 1
    assert b"a worker process was killed: look for a lack of memory" in started.stderr.read()
    # On a slow machine the first state is saved already.
    assert [path.name for path in tmp_path.glob("out/*")] in ([], ["a_text_document.unfinished"])


def test_workers_end_with_a_killed_parent(started, tmp_path):
    worker = wait_for_worker(started)
    started.kill()
    worker.wait(10)
    assert all(
        path.suffix == ".unfinished" or path.parent.suffix == ".unfinished"
        for path in tmp_path.glob("out/**/*")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_stopped_run_has_done_is_kept_and_the_same_input_and_resume_continue_from_there(
    started, tmp_path, number
):
    lines = [LINE * 3000]
    state = tmp_path / "out" / "a_text_document.unfinished" / "state.json"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        lines.append(LINE * 300)
        started.stdin.write(lines[-1])
        started.stdin.flush()
        time.sleep(0.05)
    started.send_signal(number)
    started.wait(20)
    if number == signal.SIGTERM:
        kept = (
            "what is done is kept in out/a_text_document.unfinished: the same command with "
            "--resume continues from there"
        )
        assert started.stderr.read().decode().endswith(f"preprocess_data.py: interrupted; {kept}\n")
    flags = ("--input", "-", "--output-prefix", "out/a", "--tokenizer-type", "ByteLevelTokenizer")
    result = run(tmp_path, *flags, input=b"")
    assert (
        result.returncode == 2
        and b"holds an unfinished run of this output: continue from there with --resume, or delete"
        in result.stderr
    )
    result = run(tmp_path, *flags, "--resume", input=b"".join(lines))
    assert result.returncode == 0, result.stderr
    assert b"resuming the run" in result.stderr
    assert IndexedDataset(tmp_path / "out" / "a_text_document").num_tokens == 1000 * b"".join(
        lines
    ).count(b"\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"a_text_document.{suffix}" for suffix in ("bin", "idx", "json")
    ]
