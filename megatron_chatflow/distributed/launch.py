"""Which process this is, by the variables of torchrun or SLURM, or alone.

Reads the environment, imports no torch.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_chatflow.errors import ConfigError


class LaunchError(ConfigError):
    """The processes of a job cannot become one job: variables, addresses, or who came."""

    def __init__(self, message: str, *, exit_code: int = 2, shared: bool = False) -> None:
        """Make the error.

        Args:
            message: One line.
            exit_code: 2 where the launch must be changed, 1 where a process did not come or is
                gone.
            shared: Whether the first process prints it too.
        """
        super().__init__(message)
        self.exit_code, self.shared = exit_code, shared


@dataclass(frozen=True)
class Launch:
    """Rank and size of the job as the launcher gave them."""

    launcher: str
    """torchrun, slurm or single."""
    rank: int
    world_size: int
    local_rank: int
    master_addr: str | None
    master_port: int | None
    has_agent: bool = False
    """Whether an agent of torchrun holds a store at the master's port, which rank 0 cannot have."""


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """The launch that the environment describes.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets SLURM_PROCID,
    SLURM_NTASKS and SLURM_LOCALID for each task (MASTER_ADDR, MASTER_PORT may be set by the job
    script; otherwise the first host of the step's node list and a port made from the job's number).
    A step has its own number of tasks: the shell that `salloc -n 8` opens on a node is a step of
    one. Raises LaunchError where a part is missing or cannot be.
    """
    env = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in env or "WORLD_SIZE" in env:
        _require(env, names, "start with torchrun or srun, or unset it")
        size = _number(env, "WORLD_SIZE", 1)
        rank = _number(env, "RANK", 0, size - 1, f"WORLD_SIZE {size}")
        local_rank = _local_rank(env, "LOCAL_RANK", size)
        address, port = _address(env), _number(env, "MASTER_PORT", 1, 65535)
        agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Launch("torchrun", rank, size, local_rank, address, port, agent)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        tasks = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        size = _number(env, tasks, 1) if env.get(tasks) else 1
        if size > 1:
            _require(env, ("SLURM_LOCALID",), "start with srun")
            rank = _number(env, "SLURM_PROCID", 0, size - 1, f"{tasks} {size}")
            local_rank = _local_rank(env, "SLURM_LOCALID", size)
            return Launch("slurm", rank, size, local_rank, *_slurm_meeting_point(env))
    elif "LOCAL_RANK" in env:
        _require(env, names, "start with torchrun or srun, or unset it")
    return Launch("single", 0, 1, 0, None, None)


def _slurm_meeting_point(env: Mapping[str, str]) -> tuple[str, int]:
    if env.get("MASTER_ADDR"):
        address = _address(env)
    else:
        _require(env, ("SLURM_STEP_NODELIST",), "set MASTER_ADDR in the job script")
        address = first_host(env["SLURM_STEP_NODELIST"])
    if env.get("MASTER_PORT"):
        return address, _number(env, "MASTER_PORT", 1, 65535)
    _require(env, ("SLURM_JOB_ID",), "set MASTER_PORT in the job script")
    return address, 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000


def _require(env: Mapping[str, str], names: tuple[str, ...], what_to_do: str) -> None:
    missing = [name for name in names if name not in env]
    if missing:
        known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID")
        has = next(name for name in known if name in env)
        raise LaunchError(f"the environment has {has} but not {', '.join(missing)}; {what_to_do}")


def _number(
    env: Mapping[str, str], name: str, least: int, most: int | None = None, of: str = ""
) -> int:
    """An environment variable as a whole number from `least` to `most`, which is that `of` what."""
    text = env[name]
    bounds = f"from {least} up" if most is None else f"from {least} to {most}"
    bounds += f" ({of})" if of else ""
    number = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
    if number < least or (most is not None and number > most):
        raise LaunchError(
            f"the environment variable {name} is {text!r}; it must be a whole number {bounds}: "
            "start with torchrun or srun, or set it so"
        )
    return number


def _local_rank(env: Mapping[str, str], name: str, size: int) -> int:
    """A process's place on its node, which has at most as many processes as the job."""
    here, of = size, "the job's processes"
    if name == "LOCAL_RANK" and "LOCAL_WORLD_SIZE" in env:
        here = _number(env, "LOCAL_WORLD_SIZE", 1, size, f"WORLD_SIZE {size}")
        of = f"LOCAL_WORLD_SIZE {here}"
    return _number(env, name, 0, here - 1, of)


def _address(env: Mapping[str, str]) -> str:
    text = env["MASTER_ADDR"]
    if not re.fullmatch(r"[\w.:%-]+", text) or re.fullmatch(r"[^:]+:[0-9]+", text):
        raise LaunchError(
            f"the environment variable MASTER_ADDR is {text!r}; it must be the name or the address "
            "of rank 0's host alone, without a port: start with torchrun or srun, or set it so"
        )
    return text


def node_name(environ: Mapping[str, str] | None = None) -> str:
    """What messages call this node: SLURM's name for it, else the host's."""
    env = os.environ if environ is None else environ
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list such as ``gpu[03-05,9],login1``.

    scontrol expands a list with brackets.
    """
    if re.fullmatch(r"[\w.,-]+", nodelist):
        return nodelist.split(",")[0]
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(
            f"SLURM_STEP_NODELIST {nodelist}: scontrol cannot expand it ({error}); set MASTER_ADDR "
            "in the job script"
        ) from None
    names = done.stdout.split()
    if not names:
        raise LaunchError(
            f"SLURM_STEP_NODELIST {nodelist}: scontrol names no host; set MASTER_ADDR in the job "
            "script"
        )
    return names[0]
