"""Process groups: torch.distributed over the launch, then megatron-core's groups over it."""

from __future__ import annotations

import datetime
import warnings

import torch
import torch.distributed as dist

from megatron_chatflow.config.pipeline import virtual_pipeline_size
from megatron_chatflow.config.settings import ParallelSettings
from megatron_chatflow.engine import cpu, matmul
from megatron_chatflow.engine.launch import Launch
from megatron_chatflow.engine.lifeline import Lifeline


def hide_engine_warnings() -> None:
    """Keep advice that megatron-core and torch print on every rank (missing apex, deprecations of their own) off the console of a command."""
    for module in (r"megatron\.core", r"torch\."):
        warnings.filterwarnings("ignore", module=module)


def device(local_rank: int) -> torch.device:
    """The device of this process."""
    return cpu.CPU if cpu.is_needed() else torch.device("cuda", local_rank)


def initialize(launch: Launch, parallel: ParallelSettings, num_layers: int) -> None:
    """Install the CPU redirection where it is needed, then make every process group.

    A single process needs no launcher and no port: its groups live on an in-memory store.
    """
    cpu.install()
    where = device(launch.local_rank)
    backend = parallel.distributed_backend or ("gloo" if where.type == "cpu" else "nccl")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    sizes = {"rank": launch.rank, "world_size": launch.world_size, "timeout": timeout}
    if launch.launcher == "single":
        dist.init_process_group(backend, store=dist.HashStore(), **sizes)
    elif launch.launcher == "slurm":
        dist.init_process_group(backend, init_method=f"tcp://{launch.master_addr}:{launch.master_port}", **sizes)
    else:
        dist.init_process_group(backend, init_method="env://", **sizes)
    if where.type == "cpu":
        matmul.agree()
    initialize_model_parallel(parallel, num_layers)


def watch(launch: Launch) -> Lifeline | None:
    """The line that tells why a job of several processes came down; None where there is one process. The groups are initialised."""
    return Lifeline(dist.distributed_c10d._get_default_store(), launch.rank, launch.world_size) if launch.world_size > 1 else None


def initialize_model_parallel(parallel: ParallelSettings, num_layers: int) -> None:
    """megatron-core's tensor, pipeline and data groups over the initialised world."""
    from megatron.core import parallel_state

    virtual = virtual_pipeline_size(parallel, num_layers)
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        virtual if virtual > 1 else None,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )


def data_parallel() -> tuple[int, int]:
    """(rank, size) of this process among those that read different samples."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def shut_down() -> None:
    """Leave every process group; a second call does nothing."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
