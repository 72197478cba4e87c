"""A job on a real SLURM cluster of two nodes: queued by `chatflow submit`, preempted, put back into
the queue, finished.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.ops.cluster import NODES, Cluster, cluster, missing
from tests.pool import Pool
from tests.sample import CURRICULUM, SETTINGS, largest_difference, metrics, train

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Iterator[Cluster]:
    """The cluster; each node has the sample corpora on its own disk."""
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        for node in NODES:
            for path in sample.glob("*_document.*"):
                if path.suffix in (".bin", ".idx", ".json"):
                    shutil.copy(path, made.node_disk(node))
        (made.folder / "bin").mkdir()
        command = made.folder / "bin" / "chatflow"
        command.write_text(
            f'#!/bin/sh\nPYTHONPATH="{os.pathsep.join([str(ROOT), *sys.path[1:]])}" exec '
            f'{sys.executable} -m megatron_chatflow "$@"\n'
        )
        command.chmod(0o755)
        yield made


def settings(made: Cluster, folder: Path, iterations: int) -> None:
    """run.yaml and curriculum.yaml in a folder that all nodes see; the corpora are on the nodes'
    disks.
    """
    curriculum = CURRICULUM | {
        "domains": {
            name: d | {"path": str(made.disk / d["path"])}
            for name, d in CURRICULUM["domains"].items()
        }
    }
    training, kept = (
        SETTINGS["training"] | {"train_iters": iterations, "micro_batch_size": 2},
        {"save": str(folder / "saved"), "save_interval": 10},
    )
    run = SETTINGS | {"training": training, "checkpoint": kept}
    (folder / "curriculum.yaml").write_text(
        yaml.safe_dump(curriculum, sort_keys=False), encoding="utf-8"
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")


def submit(made: Cluster, folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = made.environment | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{made.folder / 'bin'}{os.pathsep}{environment['PATH']}"
    layout = [
        "--nodes",
        "2",
        "--ntasks-per-node",
        "2",
        "--gpus-per-node",
        "0",
        "--cpus-per-task",
        "1",
        "--lead-seconds",
        "60",
    ]
    call = ["chatflow", "submit", "--config", "run.yaml", *layout, *words, "--", "--time=10"]
    return subprocess.run(
        call, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def until(condition: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text() if log.exists() else "there is no log"
        time.sleep(0.1)


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return metrics(run) if path.exists() and path.read_text().endswith("\n") else []


def test_a_preempted_job_on_nodes_with_local_disks_is_requeued_and_ends_as_on_one_process(
    two_nodes: Cluster, tmp_path: Path, pool: Pool, sample: Path
) -> None:
    settings(two_nodes, tmp_path, 60)
    run = tmp_path / "saved"
    done = submit(two_nodes, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    number = re.search(r"^job (\d+) is queued: 4 processes on 2 nodes$", done.stdout, re.MULTILINE)[
        1
    ]
    log = run / f"slurm-{number}.log"
    until(lambda: len(records(run)) >= 12, 400, log)
    two_nodes.slurm("scancel", "--signal=USR1", number)
    until(lambda: two_nodes.job(number)["Restarts"] == "1", 400, log)
    until(
        lambda: two_nodes.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 400, log
    )
    text, job = log.read_text(), two_nodes.job(number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "1", "0:0"), text
    left = re.findall(
        rf"^job {number}: exited at a signal \(code 3\), with checkpoint (\d+); requeued$",
        text,
        re.MULTILINE,
    )
    assert len(left) == 1 and 12 <= int(left[0]) < 60, text
    assert f"resuming after iteration {left[0]}" in text and text.rstrip().endswith(
        f"job {number}: the run is finished"
    )
    assert "4 processes (slurm)" in text
    assert [record["iteration"] for record in metrics(run)] == list(range(1, 61))
    ((code, _, err),) = pool.run(
        1, train, sample, "--train-iters", "60", "--save", str(tmp_path / "one")
    )
    assert code == 0, err
    assert largest_difference(metrics(run), metrics(tmp_path / "one")) < 1e-5
    assert not list(two_nodes.disk.iterdir())


def test_a_killed_process_ends_the_job_within_a_minute_and_it_continues_from_its_checkpoint(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    settings(two_nodes, tmp_path, 40)
    run = tmp_path / "saved"
    number = re.search(r"^job (\d+) ", submit(two_nodes, tmp_path).stdout)[1]
    log, pointer = run / f"slurm-{number}.log", run / "latest_checkpointed_iteration.txt"
    until(pointer.exists, 400, log)
    victim = next(pid for pid in processes(run) if rank_of(pid) == "3")
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    until(lambda: two_nodes.job(number)["Restarts"] == "1", 400, log)
    seconds = time.monotonic() - begin
    until(
        lambda: two_nodes.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 400, log
    )
    text = log.read_text()
    assert two_nodes.job(number)["JobState"] == "COMPLETED", text
    assert seconds < 60 and re.search(
        rf"^job {number}: failed with code \d+ after checkpoint \d+; requeued",
        text,
        re.MULTILINE,
    ), text
    assert "the job ends: rank 3 on " in text
    assert [record["iteration"] for record in metrics(run)] == list(range(1, 41))


def processes(run: Path) -> list[int]:
    """The training processes that save in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if (
                f"PWD={run.parent}\0".encode() in path.read_bytes()
                and b"megatron_chatflow\0train" in path.with_name("cmdline").read_bytes()
            ):
                found.append(int(path.parent.name))
    return found


def rank_of(pid: int) -> str | None:
    environment = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    return next(
        (
            word.removeprefix("SLURM_PROCID=")
            for word in environment
            if word.startswith("SLURM_PROCID=")
        ),
        None,
    )


def test_a_node_with_another_corpus_is_named_and_the_job_is_not_tried_again(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    settings(two_nodes, tmp_path, 20)
    kept = {
        suffix: (two_nodes.node_disk("n2") / f"zh_text_document{suffix}").read_bytes()
        for suffix in (".bin", ".idx", ".json")
    }
    for suffix in kept:
        shutil.copy(
            two_nodes.node_disk("n2") / f"en_text_document{suffix}",
            two_nodes.node_disk("n2") / f"zh_text_document{suffix}",
        )
    try:
        done = submit(two_nodes, tmp_path)
        number = re.search(r"^job (\d+) ", done.stdout)[1]
        log = tmp_path / "saved" / f"slurm-{number}.log"
        until(
            lambda: two_nodes.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"),
            400,
            log,
        )
    finally:
        for suffix, content in kept.items():
            (two_nodes.node_disk("n2") / f"zh_text_document{suffix}").write_bytes(content)
    text, job = log.read_text(), two_nodes.job(number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), text
    assert re.search(
        r"the corpus of zh is \w+ on n1 \(ranks 0, 1\); \w+ on n2 \(ranks 2, 3\)", text
    )
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        f"slurm-{number}.log",
        "train.sbatch",
    ]


def test_the_doctor_sees_the_job_and_lets_its_processes_meet(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    settings(two_nodes, tmp_path, 20)
    call = [
        "srun",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--time=5",
        str(two_nodes.folder / "bin" / "chatflow"),
        "doctor",
        "--full",
    ]
    done = subprocess.run(
        [*call, "--config", "run.yaml"],
        cwd=tmp_path,
        env=two_nodes.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"^launcher +slurm +\(SLURM_PROCID and SLURM_NTASKS are set; rank 0 of 4\)$",
        done.stdout,
        re.MULTILINE,
    )
    assert re.search(r"^slurm +job \d+, 2 nodes, 4 tasks +\(on n1; ", done.stdout, re.MULTILINE)
    assert re.search(r"^meeting +4 of 4 ", done.stdout, re.MULTILINE)
    assert (
        done.stdout.endswith("training: can run\n") and done.stdout.count("training: can run") == 1
    )


def test_what_cannot_run_is_refused_before_the_queue(two_nodes: Cluster, tmp_path: Path) -> None:
    settings(two_nodes, tmp_path, 20)
    done = submit(two_nodes, tmp_path, "--tensor-model-parallel-size", "3")
    assert done.returncode == 2 and "tensor_model_parallel_size 3" in done.stderr
    assert not (tmp_path / "saved").exists()
    assert two_nodes.slurm("squeue", "--noheader") == ""
