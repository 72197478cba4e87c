"""submit: what it refuses, the script it writes, and what the script does at each exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_chatflow.cli import slurm_script
from megatron_chatflow.cli.slurm_script import EXIT_AT_START, EXIT_PREEMPTED, Job, render
from tests.pool import command
from tests.sample import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Job(
    words=[
        "--config",
        "run.yaml",
        "--curriculum",
        "curriculum.yaml",
        "--save",
        "/shared/runs/zh",
        "--load",
        "/shared/base",
        "--finetune",
    ],
    save="/shared/runs/zh",
    folder="/shared/project",
    nodes=16,
    ntasks_per_node=8,
    gpus_per_node=8,
    cpus_per_task=8,
    lead_seconds=300,
    sbatch=["--partition=gpu", "--time=24:00:00"],
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settings = SETTINGS | {
        "training": SETTINGS["training"] | {"micro_batch_size": 2},
        "checkpoint": {"save": "saved", "save_interval": 10},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_is_what_submit_writes() -> None:
    assert (ROOT / "examples" / "slurm" / "train.sbatch").read_text(encoding="utf-8") == render(
        EXAMPLE
    )


def test_the_script_knows_the_exit_code_of_a_process_that_a_signal_ended_at_the_start() -> None:
    assert slurm_script.EXIT_AT_START == 128 + signal.SIGUSR1


def test_a_dry_run_prints_the_script_with_the_flags_as_written_and_leaves_nothing_behind(
    folder: Path,
) -> None:
    words = [
        "--nodes",
        "2",
        "--config",
        "run.yaml",
        "--ntasks-per-node=2",
        "--lr",
        "4e-3",
        "--dry-run",
        "--data-path",
        "1",
    ]
    code, out, err = command(
        "submit",
        *words,
        "a b",
        "2",
        "c",
        "--",
        "--partition",
        "gpu",
        "--comment=it's",
        "--exclusive",
    )
    assert (code, err) == (0, "")
    assert (
        "chatflow train --config run.yaml --lr 4e-3 --data-path 1 'a b' 2 c \"${resume[@]}\"" in out
    )
    head = re.findall(r"^#SBATCH (.*)$", out, re.MULTILINE)
    assert {
        f"--chdir={folder}",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--signal=USR1@300",
        "--requeue",
    } <= set(head)
    assert head[-3:] == ["--partition gpu", '"--comment=it\'s"', "--exclusive"]
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--tensor-model-parallel-size", "3"],
            ["num_attention_heads 4", "tensor_model_parallel_size 3"],
        ),
        (["--global-batch-size", "9"], ["global_batch_size 9", "data-parallel size 4"]),
        (["--nodes", "0"], ["--nodes"]),
        (["--gpus-per-node", "-1"], ["--gpus-per-node: '-1'"]),
        (["--mounts", "/a:/a"], ["--container"]),
        (["--ckpt-step", "5"], ["ckpt_step", "every new start"]),
        (["--no-load-optim"], ["no_load_optim", "every new start"]),
        (["--lerning-rate", "1"], ["--lerning-rate"]),
    ],
)
def test_what_the_run_would_refuse_is_refused_before_the_queue(
    folder: Path, words: list[str], parts: list[str]
) -> None:
    code, out, err = command(
        "submit", "--config", "run.yaml", "--nodes", "2", "--ntasks-per-node", "2", *words
    )
    assert (code, out) == (2, "")
    assert all(part in err for part in parts), err
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


def test_without_a_run_directory_or_without_sbatch_it_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "bare.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    code, _, err = command("submit", "--config", "bare.yaml", "--nodes", "2")
    assert code == 2 and "--save" in err
    monkeypatch.setenv("PATH", str(folder))
    code, _, err = command(
        "submit", "--config", "run.yaml", "--nodes", "1", "--ntasks-per-node", "4"
    )
    assert code == 2 and "sbatch is not on PATH" in err and not (folder / "saved").exists()


SRUN = """#!/bin/sh
echo "$@" > "$OUT/srun.log"
if [ -n "$MOVED" ]; then echo 7 > "$SAVE/latest_checkpointed_iteration.txt"; fi
exit "$CODE"
"""
SCONTROL = """#!/bin/sh
if [ "$1 $2" = "show hostnames" ]; then
    printf 'gpu03\\ngpu04\\n'
else
    echo "$@" >> "$OUT/scontrol.log"
fi
"""


def run_script(folder: Path, code: int, *, checkpoint: bool, moved: bool) -> tuple[int, str, bool]:
    """(exit code of the script, what it gave srun, whether it put the job back), where srun ends
    with `code`.
    """
    save = folder / "a run"
    save.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    if checkpoint:
        (save / "latest_checkpointed_iteration.txt").write_text("5\n")
    job = Job(
        ["--config", "run.yaml", "--load", "base", "--finetune"],
        str(save),
        str(folder),
        2,
        2,
        0,
        1,
        60,
    )
    (folder / "script").write_text(render(job))
    environment = {
        "PATH": f"{folder}{os.pathsep}/usr/bin:/bin",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "gpu[03-04]",
        "SLURM_CPUS_PER_TASK": "1",
    }
    environment |= {
        "OUT": str(folder),
        "SAVE": str(save),
        "CODE": str(code),
        "MOVED": "yes" * moved,
    }
    done = subprocess.run(
        ["bash", folder / "script"], env=environment, capture_output=True, text=True, timeout=30
    )
    requeued = folder / "scontrol.log"
    return (
        done.returncode,
        (folder / "srun.log").read_text(),
        requeued.exists() and requeued.read_text() == "requeue 42\n",
    )


@pytest.mark.parametrize(
    ("code", "moved", "requeued"),
    [
        (0, True, False),
        (2, False, False),
        (EXIT_PREEMPTED, True, True),
        (EXIT_PREEMPTED, False, True),
        (EXIT_AT_START, False, True),
        (1, True, True),
        (1, False, False),
        (137, True, True),
        (143, False, False),
    ],
)
def test_the_job_goes_back_into_the_queue_where_a_new_start_gets_further(
    tmp_path: Path, code: int, moved: bool, requeued: bool
) -> None:
    assert run_script(tmp_path, code, checkpoint=True, moved=moved)[::2] == (code, requeued)


def test_the_first_start_loads_what_was_asked_for_and_the_next_one_the_runs_own_checkpoint(
    tmp_path: Path,
) -> None:
    for folder in (tmp_path / "first", tmp_path / "next"):
        folder.mkdir()
    _, first, _ = run_script(tmp_path / "first", 0, checkpoint=False, moved=True)
    _, later, _ = run_script(tmp_path / "next", 0, checkpoint=True, moved=True)
    assert first.endswith("chatflow train --config run.yaml --load base --finetune\n")
    assert later.endswith(
        f"chatflow train --config run.yaml --load base --finetune --load {tmp_path}/next/a "
        f"run --no-finetune\n"
    )


def test_a_node_list_that_cannot_be_read_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    (tmp_path / "script").write_text(render(EXAMPLE))
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "gpu[03-04]",
    }
    done = subprocess.run(
        ["bash", tmp_path / "script"], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1 and done.stderr == "no controller\n"
