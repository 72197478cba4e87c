"""`chatflow sweep`: the runs of a file, whatever ends it in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chatflow.planner.laws.run_table import read_table
from tests.pool import command
from tests.sample import SETTINGS

STUB = Path(__file__).parent / "sweep_stub"
ROOT = Path(__file__).parents[2]
DRIVER = """
import os, sys
import megatron_chatflow.__main__ as entry
os.environ["PYTHONPATH"] = sys.argv[1]
os.chdir(sys.argv[1])  # python -m looks there first
sys.exit(entry.main(["sweep", *sys.argv[2:]]))
"""
"""The sweep is the project's; the trainings that it starts are the stub's."""
SIZES = {
    name: {"num_layers": layers, "hidden_size": width, "ffn_hidden_size": 2 * width}
    for name, layers, width in (("s", 2, 32), ("m", 3, 48))
}
BATCH_TOKENS = 8 * 64


def write_sweep(sample: Path, folder: Path, **changes: Any) -> Path:
    """A sweep of two sizes and three lengths over the sample corpora."""
    folder.mkdir(exist_ok=True)
    base = json.loads(json.dumps(SETTINGS))
    for name in ("num_layers", "hidden_size", "ffn_hidden_size"):
        del base["model"][name]
    base["data"]["curriculum"] = str(sample / "curriculum.yaml")
    base["training"] = {"micro_batch_size": 4, "global_batch_size": 8}
    base["checkpoint"] = {"save_interval": 3}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content: dict[str, Any] = {
        "base": "base.yaml",
        "runs": "runs",
        "sizes": SIZES,
        "tokens": [10 * BATCH_TOKENS, 20 * BATCH_TOKENS, 30 * BATCH_TOKENS],
        "shares": {"zh50": {"zh": 0.5, "en": 0.5}},
        "target": "zh",
        "keep": ["en"],
    }
    content |= changes
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "sweep.yaml"


def start(path: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    """`chatflow sweep` in a process, with the stub's trainings."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(STUB), str(path), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(path: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    process = start(path, *words, **variables)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def trainings(folder: Path) -> list[int]:
    """Process ids of trainings below `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in words and any(str(folder).encode() in word for word in words):
            found.append(int(entry.parent.name))
    return found


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_sweep(sample, folder)
    code, out, err = finish(path, "--jobs", "2", STUB_STEP_SECONDS="0.002")
    assert code == 0, err
    assert out == f"table of 6 of 6 runs, 6 records: {folder}/runs/runs.csv\n"
    assert "12 of 12 runs finished, 100% of the work" in err
    return folder


def test_the_table_has_the_runs_in_the_order_of_the_file(undisturbed: Path) -> None:
    records = read_table(undisturbed / "runs" / "runs.csv")
    lengths = [10 * BATCH_TOKENS, 20 * BATCH_TOKENS, 30 * BATCH_TOKENS]
    assert [(r.name.split("-")[0], r.tokens) for r in records] == [
        (size, tokens) for size in ("s", "m") for tokens in lengths
    ]
    assert {(r.language, r.share, r.replay, r.annealed) for r in records} == {
        ("zh", 0.5, 0.5, True)
    }
    assert len({r.params for r in records}) == 2


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sweep_killed_three_times_gives_the_table_of_an_undisturbed_one(
    sample: Path, tmp_path: Path, undisturbed: Path, seed: int
) -> None:
    path, draw = write_sweep(sample, tmp_path), random.Random(seed)
    for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(path, "--jobs", "2")
        wait_for(lambda: trainings(tmp_path))
        time.sleep(draw.uniform(0.1, 0.6))
        process.send_signal(sent)
        out, err = process.communicate(timeout=30)
        wait_for(lambda: not trainings(tmp_path), 5)
        assert process.returncode == (3 if sent == signal.SIGTERM else -sent), err
        assert sent == signal.SIGKILL or "run the same command again to continue" in err
    code, _, err = finish(path, "--jobs", "2", STUB_STEP_SECONDS="0.002")
    assert code == 0, err
    tables = [(folder / "runs/runs.csv").read_bytes() for folder in (tmp_path, undisturbed)]
    assert tables[0] == tables[1]


def test_a_failed_run_does_not_take_the_others_and_is_retried(
    sample: Path, tmp_path: Path, undisturbed: Path
) -> None:
    path = write_sweep(sample, tmp_path)
    fails = "s-zh50-10.24k m-zh50-trunk-16"
    code, out, err = finish(path, "--jobs", "2", STUB_STEP_SECONDS="0.002", STUB_FAILS=fails)
    assert code == 1 and "table of 3 of 6 runs" in out
    assert "s-zh50-10.24k failed, code 1: chatflow train: error: the stub fails" in err
    assert "3 runs did not start because m-zh50-trunk-16 failed" in err
    names = {record.name for record in read_table(tmp_path / "runs/runs.csv")}
    assert names == {"s-zh50-5.12k", "s-zh50-15.36k", "m-zh50-5.12k"}
    code, out, err = finish(path, "--jobs", "2", STUB_STEP_SECONDS="0.002")
    assert code == 0 and "table of 6 of 6 runs" in out, err
    assert (tmp_path / "runs/runs.csv").read_bytes() == (undisturbed / "runs/runs.csv").read_bytes()


def test_a_second_sweep_in_the_same_folder_is_refused_and_threads_are_divided(
    sample: Path, tmp_path: Path
) -> None:
    path = write_sweep(sample, tmp_path)
    first = start(path, "--jobs", "1", OMP_NUM_THREADS="7", STUB_STEP_SECONDS="1")

    def logs() -> list[str]:
        return [log.read_text() for log in (tmp_path / "runs").glob("*/train.log")]

    wait_for(lambda: any(logs()))
    code, _, err = finish(path)
    assert code == 2 and f"another sweep works in it (process {first.pid})" in err
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=30)
    assert first.returncode == 3
    cores = min(7, len(os.sched_getaffinity(0)))
    assert all(f"OMP_NUM_THREADS {cores}\n" in log for log in logs() if log)


@pytest.mark.slow
def test_lengths_are_added_and_changed_settings_refused(
    sample: Path, tmp_path: Path, undisturbed: Path
) -> None:
    path = write_sweep(sample, tmp_path, tokens=[10 * BATCH_TOKENS, 30 * BATCH_TOKENS])
    assert finish(path, "--jobs", "2", STUB_STEP_SECONDS="0.002")[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/metrics.jsonl")}
    path = write_sweep(sample, tmp_path)
    code, out, err = finish(path, "--jobs", "2", STUB_STEP_SECONDS="0.002")
    assert code == 0 and "table of 6 of 6" in out, err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    table = tmp_path / "runs/runs.csv"
    assert table.read_bytes() == (undisturbed / "runs/runs.csv").read_bytes()
    other = {**SIZES, "s": {**SIZES["s"], "lr": 1e-3}}
    code, _, err = finish(write_sweep(sample, tmp_path, sizes=other))
    assert code == 2 and "was trained with lr 0.003 and has 0.001 now; restore it" in err
    code, _, err = finish(write_sweep(sample, tmp_path, shares={"zh50": {"zh": 0.6, "en": 0.4}}))
    assert code == 2 and "the curriculum of share 'zh50' is not that of" in err


def test_a_dry_run_writes_nothing_and_counts_what_branches_save(
    sample: Path, tmp_path: Path
) -> None:
    path = write_sweep(sample, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command("sweep", str(path), "--dry-run")
    assert code == 0, err
    assert sorted(tmp_path.rglob("*")) == before
    # Legs of 8, 16 and 24 iterations in all, cooldowns of 2, 4 and 6.
    assert out.splitlines()[1].split()[-2] == f"{(24 + 12) * BATCH_TOKENS:,}"
    assert "6 runs are branches of 2 trunks (6 legs): 40% fewer tokens than 6 separate" in out
    assert "hours: not estimated; --measure" in out
    for words, text in (
        (["--measure"], "--measure has no effect without --dry-run"),
        (["--table", "--dry-run"], "--table only writes the table"),
        (["--", "--partition=gpu"], "words after -- are for sbatch; add --slurm"),
    ):
        code, _, err = command("sweep", str(path), *words)
        assert code == 2 and text in err


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """PATH with programs in place of SLURM's, and the stub as `chatflow train`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "sbatch": 'bash -n "$2" && echo 71',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol.log; echo node1',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "chatflow": f'if [ "$1" = train ]; then export PYTHONPATH={STUB}; cd {STUB}; fi\n'
        f'exec {sys.executable} -m megatron_chatflow "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    yield {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_ID": "72",
        "SLURM_ARRAY_JOB_ID": "71",
        "STUB_STEP_SECONDS": "0.002",
    }


def test_an_array_job_gives_the_same_table(
    sample: Path, tmp_path: Path, undisturbed: Path, cluster: dict[str, str]
) -> None:
    path = write_sweep(sample, tmp_path)
    words = ["sweep", str(path), "--slurm", "--", "--partition=gpu"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_chatflow", *words],
        env=cluster, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "array job 71 is queued: 2 tasks, 12 directories" in done.stdout
    script = tmp_path / "runs" / "sweep.sbatch"
    text = script.read_text()
    assert "#SBATCH --array=0-1\n" in text and "#SBATCH --partition=gpu\n" in text

    def task(number: int, **variables: str) -> tuple[int, str]:
        variables = cluster | {"SLURM_ARRAY_TASK_ID": str(number)} | variables
        done = subprocess.run(["bash", script], env=variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert task(0)[0] == 0
    code, output = task(1, STUB_FAILS="m-zh50-trunk-16")
    assert code == 1 and "m-zh50-trunk-16 ended with code 1" in output
    assert task(1)[0] == 0
    assert (tmp_path / "runs/runs.csv").read_bytes() == (undisturbed / "runs/runs.csv").read_bytes()
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


@pytest.mark.slow
def test_a_real_sweep_killed_three_times_gives_the_table_of_an_undisturbed_one(
    sample: Path, tmp_path: Path
) -> None:
    tables, draw = [], random.Random(0)
    for name, kills in (("kept", 0), ("killed", 3)):
        folder = tmp_path / name
        path = write_sweep(
            sample, folder, sizes={"s": SIZES["s"]}, tokens=[5 * BATCH_TOKENS, 10 * BATCH_TOKENS]
        )
        words = [sys.executable, "-m", "megatron_chatflow", "sweep", str(path), "--jobs", "2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for _ in range(kills):
            process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
            wait_for(lambda folder=folder: trainings(folder), 60)
            time.sleep(draw.uniform(5, 25))
            process.kill()
            process.wait()
            wait_for(lambda folder=folder: not trainings(folder), 5)
        subprocess.run(words, env=environment, check=True, timeout=900)
        tables.append((folder / "runs/runs.csv").read_bytes())
    assert tables[0] == tables[1]
