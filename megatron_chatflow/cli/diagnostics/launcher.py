"""What started this process, and the state of SLURM."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from megatron_chatflow.cli.diagnostics import Row
from megatron_chatflow.distributed.launch import Launch, read_launch
from megatron_chatflow.distributed.sockets import resolve
from megatron_chatflow.errors import ChatflowError

_SIGNS = {
    "single": "neither torchrun's nor SLURM's variables are set",
    "torchrun": "RANK and WORLD_SIZE are set",
    "slurm": "SLURM_PROCID and SLURM_NTASKS are set",
}


def launcher() -> tuple[Launch | None, list[Row]]:
    """Return (the launch, or None where it is broken; its rows)."""
    try:
        launch = read_launch()
    except ChatflowError as error:
        return None, [Row("launcher", "broken", str(error), wrong=True), _slurm()]
    rows = [
        Row(
            "launcher",
            launch.launcher,
            f"{_SIGNS[launch.launcher]}; rank {launch.rank} of {launch.world_size}",
        )
    ]
    if launch.master_addr is not None:
        rows.append(_meeting_point(launch.master_addr, launch.master_port or 0))
    return launch, [*rows, _slurm()]


def _meeting_point(host: str, port: int) -> Row:
    try:
        address = resolve(host, port, time.monotonic() + 5)[0][4][0]
    except OSError as error:
        return Row(
            "meeting point",
            f"{host}:{port}",
            f"{host} is not a name that this machine knows ({error.strerror}); set MASTER_ADDR",
            wrong=True,
        )
    return Row("meeting point", f"{host}:{port}", f"{host} is {address}")


def _slurm() -> Row:
    env = os.environ
    if "SLURM_JOB_ID" in env:
        nodes, tasks = env.get("SLURM_JOB_NUM_NODES", "?"), env.get("SLURM_NTASKS", "1")
        value = (
            f"job {env['SLURM_JOB_ID']}, {nodes} node{'s' * (nodes != '1')}, {tasks} "
            f"task{'s' * (tasks != '1')}"
        )
        gpus = env.get("SLURM_GPUS_ON_NODE", "none requested")
        facts = [
            f"on {env.get('SLURMD_NODENAME', '?')}",
            f"GPUs on this node: {gpus}",
            f"cores per task: {env.get('SLURM_CPUS_PER_TASK', '1')}",
        ]
        if int(env.get("SLURM_RESTART_COUNT", 0)):
            facts.append(f"requeued {env['SLURM_RESTART_COUNT']} times")
        if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
            facts.append("this is the batch script, not a task: put srun before the command")
        return Row("slurm", value, "; ".join(facts))
    if shutil.which("sinfo") is None:
        return Row("slurm", "none", "sinfo is not on PATH")
    try:
        asked = ["sinfo", "--noheader", "--format=%P %D x %G"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=1)
    except subprocess.CalledProcessError as error:
        return Row(
            "slurm",
            "not reachable",
            (error.stderr.strip().splitlines() or [f"sinfo ended with {error.returncode}"])[-1],
        )
    except subprocess.TimeoutExpired:
        return Row("slurm", "not reachable", "sinfo did not answer within a second")
    partitions = [
        " ".join(line.split()).replace("(null)", "no GPUs") for line in done.stdout.splitlines()
    ]
    return Row("slurm", f"{len(partitions)} partitions", "; ".join(partitions))
