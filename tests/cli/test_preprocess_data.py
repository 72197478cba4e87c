"""tools/preprocess_data.py as a program: input, output, wrong usage and progress."""

import io
import os
import subprocess
import sys

import pytest

from megatron_chatflow.cli.progress_bar import ProgressBar
from megatron_chatflow.data import IndexedDataset, read_manifest
from megatron_chatflow.data.preprocess.summary import PreprocessProgress
from tests.cli.preprocess_tool import LINE, TOOL, arguments, run


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
