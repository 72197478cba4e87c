"""Runs that are killed and taken up."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import zstandard

from megatron_chatflow.data.preprocess import pipeline as module
from megatron_chatflow.data.preprocess.options import PreprocessOptions
from megatron_chatflow.data.preprocess.pipeline import preprocess
from megatron_chatflow.data.preprocess.resume_state import InputChanged, locked_folder
from megatron_chatflow.errors import ChatflowError
from tests.data.preprocess.samples import write_table

ROOT = Path(__file__).resolve().parents[3]

DRIVER = """
import json, os, signal, sys
from megatron_chatflow.data.preprocess import pipeline as module

# The state is saved after every chunk. Before a file is synced, renamed, removed or appended to
# for the n-th time, this process is killed.
left = int(sys.argv[1])
def count(function):
    def counted(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return counted

for name in ("fsync", "replace", "unlink", "rmdir"):
    setattr(os, name, count(getattr(os, name)))
module.TokenFiles.append = count(module.TokenFiles.append)
module._CHUNK, module._CHECKPOINT_SECONDS, module._CHECKPOINT_SHARE = 1 << 10, 0.0, float("inf")
settings = json.loads(sys.argv[2])
module.preprocess(module.PreprocessOptions(**settings))
print(-left)
"""


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks as in `DRIVER`."""
    monkeypatch.setattr(module, "_CHUNK", 1 << 10)


def drive(at, settings):
    """Runs the driver; kills it at its `at`-th step, or lets it end and returns the number of steps
    (0).
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", DRIVER, str(at), json.dumps(settings)]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == (-signal.SIGKILL if at else 0), result.stderr
    return 0 if at else int(result.stdout)


def written(folder):
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"
    )  # which names the process
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def records(number):
    return [
        {
            "text": f"{i} " + "é" * (i % 97),
            "title": f"title {i}",
            "instruction": str(i),
            "output": "o" * (i % 31),
        }
        for i in range(number)
    ]


def inputs(folder):
    """A file of every kind, one of them empty, and a malformed line."""
    lines = [json.dumps(record).encode() + b"\n" for record in records(150)]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:30]), mtime=0))
    (folder / "b.jsonl").touch()
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[30:60])))
    write_table(folder / "d.parquet", records(90)[60:], 10)
    (folder / "e.jsonl").write_bytes(
        b"".join(lines[90:100]) + b"nonsense\n" + b"".join(lines[100:])
    )
    return [
        str(folder / name)
        for name in ("a.jsonl.gz", "b.jsonl", "c.jsonl.zst", "d.parquet", "e.jsonl")
    ]


@pytest.fixture
def settings(tmp_path):
    """Settings of a run over `inputs`; `output` is where."""

    def make(output, **options):
        given = {
            "input": inputs(tmp_path),
            "output_prefix": str(tmp_path / output / "x"),
            "tokenizer_type": "ByteLevelTokenizer",
        }
        return given | {"skip_malformed": True, "max_malformed": 1.0, "append_eod": True} | options

    return make


CASES = {
    "two keys": {"json_keys": ["text", "title"]},
    "shuffled conversations": {"kind": "instruct", "shuffle": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_run_killed_anywhere_and_resumed_writes_what_an_uninterrupted_one_writes(
    tmp_path, settings, small_chunks, options
):
    steps = drive(0, settings("whole", **options))
    expected = written(tmp_path / "whole")
    for turn, share in enumerate((0.2, 0.6, 0.97)):
        given = settings(f"out{turn}", **options)
        drive(max(1, int(share * steps)), given)
        preprocess(PreprocessOptions(**given, resume=True))
        assert written(tmp_path / f"out{turn}") == expected


def test_a_run_over_an_array_that_was_killed_and_resumed_writes_what_an_uninterrupted_one_writes(
    tmp_path, small_chunks
):
    (tmp_path / "a.json").write_text(json.dumps(records(300), indent=1, ensure_ascii=False))
    given = {"input": [str(tmp_path / "a.json")], "tokenizer_type": "ByteLevelTokenizer"}
    drive(100, given | {"output_prefix": str(tmp_path / "out" / "x")})
    state = json.loads((tmp_path / "out" / "x_text_document.unfinished" / "state.json").read_text())
    assert 1 < state["place"]["next"] < 300 and state["records"][0] == state["place"]["next"] - 1
    for output in ("out", "whole"):
        preprocess(
            PreprocessOptions(
                **given, output_prefix=str(tmp_path / output / "x"), resume=output == "out"
            )
        )
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_run_killed_at_every_step_writes_what_an_uninterrupted_one_writes(
    tmp_path, settings, small_chunks, options
):
    steps = drive(0, settings("whole", **options))
    expected = written(tmp_path / "whole")
    random.seed(0)
    for at in sorted({1, 2, *range(steps - 25, steps + 1), *random.sample(range(1, steps), 20)}):
        given = settings(f"out{at}", **options)
        drive(at, given)
        if at % 2:
            drive(max(1, (steps - at) // 2), given | {"resume": True})
        preprocess(PreprocessOptions(**given, resume=True))
        assert written(tmp_path / f"out{at}") == expected, at


@pytest.mark.slow
def test_the_command_killed_at_twenty_random_moments_writes_what_an_uninterrupted_one_writes(
    tmp_path,
):
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(
            json.dumps({"text": f"{i} " + "é你 " * (i % 500)}) + "\n" for i in range(12_000)
        )
    model = ROOT / "examples" / "quickstart" / "tokenizer.model"

    def command(output, *more):
        words = [
            "--input",
            "a.jsonl",
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            model,
            "--append-eod",
            "--workers",
            "2",
        ]
        return [
            sys.executable,
            ROOT / "tools" / "preprocess_data.py",
            *words,
            "--shuffle",
            "--output-prefix",
            f"{output}/x",
            *more,
        ]

    begin = time.monotonic()
    subprocess.run(command("whole"), cwd=tmp_path, check=True, capture_output=True, timeout=300)
    seconds = time.monotonic() - begin
    moments = random.Random(0)
    resumed = 0
    for turn in range(20):
        process = subprocess.Popen(
            command(f"out{turn}"),
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0.1, seconds))
        process.kill()
        process.wait()
        result = subprocess.run(
            command(f"out{turn}", "--resume"),
            cwd=tmp_path,
            capture_output=True,
            timeout=300,
            check=True,
        )
        resumed += b"resuming the run" in result.stderr
        assert written(tmp_path / f"out{turn}") == written(tmp_path / "whole")
    assert resumed > 0


@pytest.fixture
def killed(tmp_path, settings, small_chunks):
    """A run of text that was killed in the midst of `e.jsonl`."""
    given = settings("out")
    drive(200, given)
    state = json.loads((tmp_path / "out" / "x_text_document.unfinished" / "state.json").read_text())
    assert state["place"]["source"] == 4 and state["counts"]["text"]["documents"] > 90
    return given


def test_an_unfinished_run_is_named_with_both_fixes_and_left_alone(tmp_path, killed):
    before = written(tmp_path / "out")
    with pytest.raises(
        ChatflowError,
        match=(
            r"unfinished holds an unfinished run .*: continue .* with --resume, or delete the "
            r"folder to start over"
        ),
    ):
        preprocess(PreprocessOptions(**killed))
    assert written(tmp_path / "out") == before


def test_a_resumed_run_says_where_it_continues_and_counts_from_there(killed):
    notes, seen = [], []
    with mock.patch.object(module.logger, "info", notes.append):
        summary = preprocess(PreprocessOptions(**killed, resume=True, log_interval=1), seen.append)
    (note,) = notes
    documents = int(note.removesuffix(" documents").rpartition(" ")[2])
    assert note.startswith("resuming the run in") and seen[0].documents > documents > 90
    (manifest,) = summary.corpora.values()
    assert summary.bytes < manifest.bytes == seen[-1].bytes
    assert seen[0].done > 0.5 and seen[-1].done == 1.0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"append_eod": False}, "another --append-eod (true, now false)"),
        ({"shuffle": True}, "another --seed (null, now 1234)"),
        (
            {"skip_malformed": False, "max_malformed": None},
            "another --skip-malformed (true, now false)",
        ),
        ({"lang": "x"}, 'another --lang (null, now "x")'),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 9}, "another tokenizer ("),
    ],
)
def test_other_settings_are_refused_by_name_and_the_unfinished_run_is_left_alone(
    tmp_path, killed, changed, named
):
    before = written(tmp_path / "out")
    with pytest.raises(ChatflowError) as error:
        preprocess(PreprocessOptions(**killed | changed | {"resume": True}))
    assert named in str(error.value) and "restore it, or delete" in str(error.value)
    assert written(tmp_path / "out") == before


def test_a_longer_or_missing_input_is_refused(tmp_path, killed):
    with pytest.raises(ChatflowError, match="another --input-format"):
        preprocess(PreprocessOptions(**killed | {"input": killed["input"][1:]}, resume=True))
    with open(tmp_path / "e.jsonl", "ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ChatflowError, match="another --input "):
        preprocess(PreprocessOptions(**killed, resume=True))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "e.jsonl"])
def test_an_input_of_the_same_size_with_another_content_is_refused_until_it_is_restored(
    tmp_path, settings, killed, name
):
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(
        gzip.compress(gzip.decompress(content), mtime=1)
        if name == "a.jsonl.gz"
        else content.replace(b"90 ", b"09 ", 1)
    )
    assert (tmp_path / name).stat().st_size == len(content)
    with pytest.raises(
        InputChanged,
        match=f"--resume: {name} is not what the unfinished run read: restore it, or delete",
    ):
        preprocess(PreprocessOptions(**killed, resume=True))
    (tmp_path / name).write_bytes(content)
    preprocess(PreprocessOptions(**killed, resume=True))
    preprocess(PreprocessOptions(**settings("whole")))
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_inputs_that_were_only_touched_are_read_again_and_accepted(tmp_path, settings, killed):
    for path in killed["input"]:
        os.utime(path, (1, 1))
    preprocess(PreprocessOptions(**killed, resume=True))
    preprocess(PreprocessOptions(**settings("whole")))
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_damaged_state_is_refused_with_the_fix(tmp_path, killed):
    state = tmp_path / "out" / "x_text_document.unfinished" / "state.json"
    for content in (b"", b"{}", b"\xff", state.read_bytes()[:-5]):
        state.write_bytes(content)
        with pytest.raises(
            ChatflowError,
            match=r"state\.json is damaged .*: restore it, or delete .* to start over",
        ):
            preprocess(PreprocessOptions(**killed, resume=True))


def test_what_a_run_left_that_saved_no_state_is_replaced(tmp_path, settings):
    given = settings("out")
    drive(1, given)
    assert (tmp_path / "out" / "x_text_document.unfinished").is_dir()
    preprocess(PreprocessOptions(**given))
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".bin", ".idx", ".json"}


def test_processes_that_come_and_go_never_have_one_folder_at_once(tmp_path):
    folder, marker = str(tmp_path / "x.unfinished"), str(tmp_path / "marker")
    children = []
    for _ in range(3):
        if pid := os.fork():
            children.append(pid)
            continue
        code, end = 1, time.monotonic() + 1.5
        try:
            while time.monotonic() < end:
                with suppress(ChatflowError), locked_folder(folder):
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                    os.listdir(folder)
                    os.unlink(marker)
            code = 0
        finally:
            os._exit(code)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert os.listdir(tmp_path) == []


def test_resume_without_an_unfinished_run_starts_at_the_beginning_and_says_so(settings):
    notes = []
    with mock.patch.object(module.logger, "info", notes.append):
        preprocess(PreprocessOptions(**settings("out"), resume=True))
    assert notes == [
        "--resume: there is no unfinished run of this output, so this one starts at the beginning"
    ]


def test_two_runs_into_one_output_are_refused(tmp_path, settings):
    with (
        locked_folder(PreprocessOptions(**settings("out")).unfinished()),
        pytest.raises(ChatflowError, match=r"another process \(.*\) is writing into"),
    ):
        preprocess(PreprocessOptions(**settings("out")))
