"""Which process this is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_chatflow.config import UsageError
from megatron_chatflow.engine.launch import Launch, first_host, read_launch


def test_without_a_launcher_there_is_one_process() -> None:
    assert read_launch({}) == Launch("single", 0, 1, 0, None, None)


def test_torchruns_variables_are_read() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert read_launch(env) == Launch("torchrun", 3, 8, 1, "n1", 29500)


def test_half_of_torchruns_variables_is_an_error_that_names_the_rest() -> None:
    with pytest.raises(UsageError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        read_launch({"RANK": "0", "WORLD_SIZE": "2"})


SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n1,n2", "SLURM_JOB_ID": "45"}


def test_sruns_variables_are_read_and_the_first_host_is_the_meeting_point() -> None:
    assert read_launch(SLURM) == Launch("slurm", 5, 8, 1, "n1", 20045)


def test_the_job_script_may_name_the_meeting_point() -> None:
    assert read_launch(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}) == Launch("slurm", 5, 8, 1, "10.0.0.1", 1234)


def test_inside_a_batch_script_without_srun_there_is_one_process() -> None:
    assert read_launch({"SLURM_JOB_ID": "45", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).launcher == "single"


def test_the_tasks_of_the_step_count_and_not_those_of_the_job() -> None:
    shell = SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert read_launch(shell) == Launch("single", 0, 1, 0, None, None)
    assert read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "8"}) == Launch("slurm", 5, 8, 1, "n1", 20045)
    assert read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "16"}).world_size == 8


def test_a_node_list_with_brackets_is_expanded_by_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[03-05]" ] && printf "gpu03\\ngpu04\\ngpu05\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert first_host("gpu[03-05]") == "gpu03"
    with pytest.raises(UsageError, match="set MASTER_ADDR"):
        first_host("other[1-2]")
    assert subprocess.run(["scontrol", "x"], check=False).returncode != 0
