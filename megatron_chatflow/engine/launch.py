"""Which process this is, told by torchrun, by SLURM, or by nobody (then it is the only one). Reads the environment, imports no torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_chatflow.config import UsageError


@dataclass(frozen=True)
class Launch:
    """Rank and size of the job as the launcher told them."""

    launcher: str
    """torchrun, slurm or single."""
    rank: int
    world_size: int
    local_rank: int
    master_addr: str | None
    master_port: int | None


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """The launch that the environment describes.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID for each task (MASTER_ADDR, MASTER_PORT may be set by the job script; otherwise the first host of the
    step's node list and a port made from the job's number). Raises UsageError where a part is missing. A step has its own number of tasks:
    the shell that `salloc -n 8` opens on a node is a step of one.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in env]
        if missing:
            raise UsageError(
                f"the environment has {'RANK' if 'RANK' in env else 'WORLD_SIZE'} but not {', '.join(missing)}; "
                "start with torchrun or srun, or unset it"
            )
        return Launch("torchrun", int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and tasks > 1:
        address = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
        port = int(env.get("MASTER_PORT") or 20000 + int(env["SLURM_JOB_ID"]) % 20000)
        return Launch("slurm", int(env["SLURM_PROCID"]), tasks, int(env["SLURM_LOCALID"]), address, port)
    return Launch("single", 0, 1, 0, None, None)


def node_name(environ: Mapping[str, str] | None = None) -> str:
    """What messages call this node: SLURM's name for it, else the host's."""
    env = os.environ if environ is None else environ
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list such as ``gpu[03-05,9],login1``, expanded by scontrol where the list has brackets."""
    if re.fullmatch(r"[\w.,-]+", nodelist):
        return nodelist.split(",")[0]
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"SLURM_STEP_NODELIST {nodelist}: scontrol cannot expand it ({error}); set MASTER_ADDR in the job script") from None
    return done.stdout.split()[0]
