"""tools/preprocess_data.py as a program."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_chatflow.cli.preprocess import main
from megatron_chatflow.cli.progress_bar import ProgressBar
from megatron_chatflow.data import IndexedDataset, read_manifest
from megatron_chatflow.data.preprocess.summary import PreprocessProgress

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
LINE = json.dumps({"text": "x" * 1000}).encode() + b"\n"


def command(*arguments):
    return [sys.executable, str(TOOL), *map(str, arguments)]


def run(folder, *arguments, input=None):
    """Runs the tool in a folder, without the repository on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        input=input,
        capture_output=True,
        env=environment,
        timeout=60,
    )


def arguments(*more):
    return (
        "--input",
        "a.jsonl",
        "--output-prefix",
        "out/a",
        "--tokenizer-type",
        "ByteLevelTokenizer",
        *more,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE * 3)
    return tmp_path


def test_it_works_from_any_folder_with_megatron_s_flags(folder):
    result = run(
        folder,
        *arguments(
            "--append-eod", "--workers", "2", "--json-keys", "text", "--log-interval", "100"
        ),
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        f"a_text_document.{suffix}" for suffix in ("bin", "idx", "json")
    ]
    assert (
        b"out/a_text_document.bin, .idx and .json: 3 documents, 3,003 tokens, 3,000 bytes of text"
        in result.stdout
    )
    assert (
        IndexedDataset(folder / "out" / "a_text_document").num_tokens
        == read_manifest(folder / "out" / "a_text_document").tokens
        == 3003
    )


def test_it_reads_the_standard_input(folder):
    flags = (
        "--input",
        "-",
        "--output-prefix",
        "b",
        "--tokenizer-type",
        "ByteLevelTokenizer",
        "--input-format",
        "text",
    )
    result = run(folder, *flags, input="é\nb\n".encode())
    assert result.returncode == 0, result.stderr
    assert IndexedDataset(folder / "b_text_document").document(0).tolist() == list("é".encode())
    assert read_manifest(folder / "b_text_document").sources[0]["name"] == "standard input"


def in_bash(folder, arguments, text):
    line = (
        f"{sys.executable} {TOOL} --tokenizer-type ByteLevelTokenizer --workers 1 "
        f"--output-prefix b {arguments}"
    )
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, input=text, capture_output=True, timeout=60
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "--input <(cat a.jsonl)",
        "--input <(gzip -c a.jsonl) --resume",
        "--input /dev/stdin < <(cat a.jsonl)",
        "--input /dev/stdin < a.jsonl",
        "--input /dev/fd/0 < <(cat a.jsonl)",
        "--input <(head -n 1 a.jsonl) <(tail -n 2 a.jsonl)",
        "--input pipe & cat a.jsonl > pipe; wait -n",
    ],
)
def test_it_reads_pipes(folder, arguments):
    os.mkfifo(folder / "pipe")
    result = in_bash(folder, arguments, b"")
    assert result.returncode == 0, result.stderr
    assert IndexedDataset(folder / "b_text_document").num_documents == 3
    size = sum(source["size"] for source in read_manifest(folder / "b_text_document").sources)
    assert size == 3 * len(LINE) or "gzip" in arguments


def test_a_pipe_of_which_the_end_is_missing_is_refused(folder):
    result = in_bash(folder, "--input <(gzip -c a.jsonl | head -c 30)", b"")
    assert (
        result.returncode == 2
        and b"cannot be read to its end" in result.stderr
        and b"Traceback" not in result.stderr
    )


_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import numpy
from megatron_chatflow.cli.preprocess import main
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
sys.exit(main())
"""


def test_too_little_memory_is_one_message(folder):
    (folder / "a.jsonl").write_bytes(b'{"text": "' + b"x" * (40 << 20) + b'"}\n')
    command = [sys.executable, "-c", _LITTLE_MEMORY, *arguments("--workers", "1")]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    result = subprocess.run(command, cwd=folder, capture_output=True, env=environment, timeout=60)
    assert result.returncode == 1
    assert result.stderr.decode() == (
        "chatflow preprocess: not enough memory: try fewer --workers, or a smaller "
        "--max-document-bytes; nothing was written: run the command again\n"
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--partitions", "4"],
            "--partitions: one run uses all --workers on all files",
        ),
        (
            ["--find-optimal-num-workers"],
            "--find-optimal-num-workers: the pipeline keeps every process busy",
        ),
        (
            ["--vocab_extra_ids=1"],
            "--vocab-extra-ids: extend the tokenizer itself; drop the flag",
        ),
        (
            ["--keep-newlines"],
            (
                "--keep-newlines has no meaning without --split-sentences: documents are kept "
                "unchanged; drop the flag"
            ),
        ),
        (["--apend-eod"], "unknown flag --apend-eod; did you mean --append-eod?"),
        (["--append"], "unknown flag --append; did you mean --append-eod?"),
        (["--workers", "two"], "--workers: invalid int value: 'two'"),
        (
            ["--tokenizer-type", "SentencepieceTokenizer"],
            (
                "tokenizer_type 'SentencepieceTokenizer' is unknown: did you mean "
                "SentencePieceTokenizer?"
            ),
        ),
        (
            ["--input", "gone.jsonl"],
            "--input gone.jsonl cannot be read (No such file or directory): check the path",
        ),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(folder, more, sentence):
    result = run(folder, *arguments(*more))
    assert result.returncode == 2
    assert result.stderr.decode().startswith(f"preprocess_data.py: error: {sentence}")
    assert result.stderr.count(b"\n") == 1 and not result.stdout
    assert not (folder / "out").exists()


def test_a_malformed_line_is_exit_code_1_and_left_out_lines_are_exit_code_0(folder):
    (folder / "a.jsonl").write_bytes(LINE + b"nonsense\n")
    result = run(folder, *arguments())
    assert result.returncode == 1
    assert result.stderr.startswith(b"preprocess_data.py: a.jsonl, line 2: not JSON")
    assert b"preprocess_data.py: 1 malformed record, so nothing was written" in result.stderr
    assert not (folder / "out").exists()
    result = run(folder, *arguments("--skip-malformed", "--max-malformed", "1"))
    assert result.returncode == 0
    assert b"left out: a.jsonl, line 2: not JSON" in result.stderr
    assert b"left out: 1 malformed records, 0 empty documents" in result.stdout


def test_an_output_that_cannot_be_written_is_exit_code_1(folder):
    (folder / "out").write_text("a file where a folder should be")
    result = run(folder, *arguments())
    assert result.returncode == 1
    assert (
        result.stderr.startswith(b"preprocess_data.py: out")
        and b"cannot be written" in result.stderr
        and result.stderr.count(b"\n") == 1
    )


def test_help_has_an_example_of_every_kind(folder):
    result = run(folder, "--help")
    assert result.returncode == 0
    for words in (b"--kind parallel --template", b"--kind instruct", b"--input -", b"exit codes"):
        assert words in result.stdout


def _hear_interrupts():
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
        preexec_fn=_hear_interrupts,
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


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere():
    progress = PreprocessProgress(
        documents=1500, bytes=3_000_000, seconds=2.0, done=0.5, rate=1_500_000.0, left=3725.4
    )
    words = "1,500 documents, 3.0 MB of text, 1.50 MB/s, 50% of the input, 1:02:05 left"
    for terminal, expected in (
        (False, f"{words}\n"),
        (True, f"\r[{'#' * 15}{' ' * 15}] {words}\x1b[K\n"),
    ):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        with ProgressBar(stream) as bar:
            bar(progress)
            bar(progress)  # less than a second later
        assert stream.getvalue() == expected


def test_of_an_input_of_unknown_size_progress_shows_what_is_known():
    stream = io.StringIO()
    with ProgressBar(stream) as bar:
        bar(
            PreprocessProgress(
                documents=1, bytes=1000, seconds=2.0, done=None, rate=500_000.0, left=None
            )
        )
    assert stream.getvalue() == "1 documents, 0.0 MB of text, 0.50 MB/s\n"
