"""Which process this is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chatflow.config import Config, to_yaml
from megatron_chatflow.distributed.launch import Launch, LaunchError, first_host, read_launch
from megatron_chatflow.errors import ChatflowError


def test_without_a_launcher_there_is_one_process() -> None:
    assert read_launch({}) == Launch("single", 0, 1, 0, None, None)


def test_torchruns_variables_are_read() -> None:
    env = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "29500",
    }
    assert read_launch(env) == Launch("torchrun", 3, 8, 1, "n1", 29500)


def test_half_of_torchruns_variables_is_an_error_that_names_the_rest() -> None:
    with pytest.raises(ChatflowError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        read_launch({"RANK": "0", "WORLD_SIZE": "2"})


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number from 1 up"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'; it must"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''; it must"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'; it must"),
        ({"WORLD_SIZE": "\u0662"}, "WORLD_SIZE is '\u0662'; it must"),
        (
            {"RANK": "x"},
            "RANK is 'x'; it must be a whole number from 0 to 1 .WORLD_SIZE 2.: start with",
        ),
        ({"RANK": "5"}, "RANK is '5'; it must be a whole number from 0 to 1 .WORLD_SIZE 2."),
        ({"RANK": "2"}, "RANK is '2'; it must"),
        ({"RANK": "-1"}, "RANK is '-1'; it must"),
        ({"RANK": " 1"}, "RANK is ' 1'; it must"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2'; it must be a whole number from 0 to 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'; it must"),
        (
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
            "LOCAL_RANK is '1'; .* from 0 to 0 .LOCAL_WORLD_SIZE 1.",
        ),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3'; .* from 1 to 2 .WORLD_SIZE 2."),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'; it must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'; it must"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; it must"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is ''; it must be the name or the address"),
        ({"MASTER_ADDR": "n1:29500"}, "MASTER_ADDR is 'n1:29500'; it must"),
        ({"MASTER_ADDR": "tcp://n1"}, "MASTER_ADDR is 'tcp://n1'; it must"),
        ({"RANK": None}, "has WORLD_SIZE but not RANK; start with torchrun or srun"),
        ({"WORLD_SIZE": None}, "has RANK but not WORLD_SIZE; start with torchrun or srun"),
        ({"WORLD_SIZE": None, "RANK": None}, "has LOCAL_RANK but not RANK, WORLD_SIZE; start"),
    ],
)
def test_variables_that_cannot_be_are_refused_by_name(
    wrong: dict[str, str | None], message: str
) -> None:
    env = {key: value for key, value in (TORCHRUN | wrong).items() if value is not None}
    with pytest.raises(LaunchError, match=message) as error:
        read_launch(env)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "address", ["n1", "n1.cluster.local", "10.0.0.1", "::1", "fe80::1%eth0", "gpu_7-a"]
)
def test_names_and_addresses_are_taken(address: str) -> None:
    assert read_launch(TORCHRUN | {"MASTER_ADDR": address}).master_addr == address


def test_an_agent_of_torchrun_has_the_port() -> None:
    assert read_launch(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).has_agent
    assert not read_launch(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).has_agent


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_every_process_reports_them_before_anything_heavy_is_imported(
    command: str, local_rank: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    script = (
        "import sys\nfrom megatron_chatflow.__main__ import main\n"
        "code = main(sys.argv[1:])\nassert not {'torch', 'megatron.core'} & "
        "set(sys.modules)\nsys.exit(code)"
    )
    words = ["--load", str(tmp_path)] if command != "train" else ["--curriculum", "x.yaml"]
    words += ["--prompt", "x"] if command == "generate" else []
    env = (
        os.environ
        | TORCHRUN
        | {"RANK": "x", "LOCAL_RANK": local_rank, "PYTHONPATH": str(Path(__file__).parents[2])}
    )
    done = subprocess.run(
        [sys.executable, "-c", script, command, *words],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "error: the environment variable RANK is 'x'" in done.stderr, (
        done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n1,n2",
    "SLURM_JOB_ID": "45",
}


def test_sruns_variables_are_read_and_the_first_host_is_the_meeting_point() -> None:
    assert read_launch(SLURM) == Launch("slurm", 5, 8, 1, "n1", 20045)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"SLURM_PROCID": "8"},
            "SLURM_PROCID is '8'; it must be a whole number from 0 to 7 .SLURM_NTASKS 8.",
        ),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'; it must"),
        ({"SLURM_NTASKS": "x"}, "SLURM_NTASKS is 'x'; it must"),
        ({"SLURM_NTASKS": "0"}, "SLURM_NTASKS is '0'; it must"),
        ({"SLURM_LOCALID": "9"}, "SLURM_LOCALID is '9'; it must"),
        ({"SLURM_LOCALID": None}, "has SLURM_PROCID but not SLURM_LOCALID"),
        (
            {"SLURM_STEP_NODELIST": None},
            "but not SLURM_STEP_NODELIST; set MASTER_ADDR in the job script",
        ),
        ({"SLURM_JOB_ID": None}, "but not SLURM_JOB_ID; set MASTER_PORT in the job script"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'; it must"),
        ({"MASTER_ADDR": "n1:5"}, "MASTER_ADDR is 'n1:5'; it must"),
    ],
)
def test_variables_of_slurm_that_cannot_be_are_refused_by_name(
    wrong: dict[str, str | None], message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        read_launch({key: value for key, value in (SLURM | wrong).items() if value is not None})


def test_the_job_script_may_name_the_meeting_point() -> None:
    assert read_launch(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}) == Launch(
        "slurm", 5, 8, 1, "10.0.0.1", 1234
    )


def test_inside_a_batch_script_without_srun_there_is_one_process() -> None:
    assert (
        read_launch({"SLURM_JOB_ID": "45", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).launcher
        == "single"
    )


def test_the_tasks_of_the_step_count_and_not_those_of_the_job() -> None:
    shell = SLURM | {
        "SLURM_STEP_ID": "4294967290",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
    }
    assert read_launch(shell) == Launch("single", 0, 1, 0, None, None)
    assert read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "8"}) == Launch(
        "slurm", 5, 8, 1, "n1", 20045
    )
    assert read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "16"}).world_size == 8


def test_a_node_list_with_brackets_is_expanded_by_scontrol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text(
        '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[03-05]" ] && printf '
        '"gpu03\\ngpu04\\ngpu05\\n"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert first_host("gpu[03-05]") == "gpu03"
    with pytest.raises(ChatflowError, match="set MASTER_ADDR"):
        first_host("other[1-2]")
    assert subprocess.run(["scontrol", "x"], check=False).returncode != 0
