"""Process groups: torch.distributed over the launch, then megatron-core's groups over it."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import itertools
import os
import resource
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from megatron_chatflow.config.pipeline_layout import virtual_pipeline_size
from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.distributed import bf16_matmul, cuda_shim
from megatron_chatflow.distributed.heartbeat import HeartbeatMonitor, prepare
from megatron_chatflow.distributed.launch import Launch, LaunchError, node_name
from megatron_chatflow.distributed.rendezvous import close as close_meeting
from megatron_chatflow.distributed.rendezvous import rendezvous, require_agent

_monitor: HeartbeatMonitor | None = None
_meetings = itertools.count()
"""A number for each meeting of this process at the store of an agent of torchrun."""


_HIDDEN_WARNINGS = (
    # without Apex and Transformer Engine the portable layers are used, as one line reports
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    # deprecations of what megatron-core 0.16 itself calls
    r"The following imports from `dynamic_context\.py`",
    r"The 'megatron\.core\.transformer\.custom_layers\.transformer_engine'",
    r"full scope is deprecated",
    r"MLP requires ffn_hidden_size",
    r"Warning: tp_group is None",
    r"`torch\.jit\.script(_method)?` is deprecated",
    r"`torch\.distributed\.\w+` is deprecated",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    # a job script of `chatflow submit` sets CUDA_DEVICE_MAX_CONNECTIONS
    r"When using (sequence parallelism|async grad allreduce) it is recommended to set",
)
"""How warnings begin that megatron-core and torch print on every rank: regular expressions."""


def hide_engine_warnings() -> None:
    """Keep known warnings of megatron-core and torch, about their own code, off the console."""
    for message in _HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", message=rf"\s*{message}")


def install_engine() -> None:
    """Make megatron-core usable on this machine; call it before the first import of megatron."""
    hide_engine_warnings()
    cuda_shim.install()


def device(local_rank: int) -> torch.device:
    """The device of this process."""
    return cuda_shim.CPU if cuda_shim.is_needed() else torch.device("cuda", local_rank)


def initialize(
    launch: Launch, parallel: ParallelSettings, num_layers: int
) -> HeartbeatMonitor | None:
    """Install the CPU redirection where it is needed, then make every process group.

    A single process needs no port: its groups live on an in-memory store. Several meet first, and
    what watches over them is returned; `shut_down` closes it.

    Raises:
        LaunchError: the processes do not come together within `init_timeout`.
    """
    global _monitor
    cuda_shim.install()
    # The import takes seconds, which are not those of --init-timeout.
    from megatron.core import parallel_state  # noqa: F401

    where = device(launch.local_rank)
    backend = parallel.distributed_backend or ("gloo" if where.type == "cpu" else "nccl")
    if where.type == "cuda":
        _use_gpu(launch.local_rank)
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    store, monitor = HashStore(), None
    if launch.world_size > 1:
        own_gpu = backend == "nccl" and where.type == "cuda"  # gloo can share one
        gpu = str(torch.cuda.get_device_properties(where).uuid) if own_gpu else None
        store, monitor = _meet(launch, parallel.init_timeout, gpu)
        store.set_timeout(timeout)
        _monitor = monitor
    try:
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )
        dist.all_reduce(torch.ones(1, device=where))  # connects what connects at the first use
        if where.type == "cpu":
            bf16_matmul.agree()
        initialize_model_parallel(parallel, num_layers)
        if monitor is not None:
            monitor.joined()
    except Exception as error:
        if monitor is None:
            raise
        message = monitor.explain(error)
        if message is None:
            monitor.fail(error)
        shut_down()
        raise LaunchError(f"the process groups cannot be made: {message}", exit_code=1) from None
    return monitor


def _use_gpu(local_rank: int) -> None:
    there = torch.cuda.device_count()
    if local_rank >= there:
        raise LaunchError(
            f"LOCAL_RANK is {local_rank}, but this process sees {there} GPU{'s' * (there != 1)}; "
            "start as many processes on a node as it has GPUs, and let each see all of them"
        )
    torch.cuda.set_device(local_rank)


def _meet(launch: Launch, seconds: int, gpu: str | None) -> tuple[Store, HeartbeatMonitor]:
    """The store of the job's process groups, and this rank's monitor over a separate client."""
    timeout = datetime.timedelta(seconds=seconds)

    def open_store(host: str, port: int, *, serve: bool = False) -> TCPStore:
        return TCPStore(host, port, None, serve, timeout, wait_for_workers=False)

    served: list[TCPStore] = []

    def serve() -> int:
        _allow_connections(4 * launch.world_size)
        served.append(open_store("localhost", 0, serve=True))
        prepare(served[0], launch.world_size)
        return served[0].port

    def agent_port(own: int | None, left: float) -> int:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        require_agent(launch, left)
        try:
            with _deadline(seconds + 5):
                agent = open_store(launch.master_addr or "", launch.master_port or 0)
                shared = PrefixStore(f"chatflow/{attempt}/{next(_meetings)}", agent)
                if own is not None:
                    return int(shared.compare_set("port", "", str(own)))
                shared.wait(["port"], datetime.timedelta(seconds=max(left, 1)))
                return int(shared.get("port"))
        except dist.DistStoreError:
            raise LaunchError(
                f"rank 0 has not come within {seconds} s to the agent of torchrun at "
                f"{launch.master_addr}, port {launch.master_port}; see what it printed",
                exit_code=1,
            ) from None

    try:
        met = rendezvous(launch, seconds, serve, gpu, agent_port if launch.has_agent else None)
        with _deadline(seconds + 5):
            own = open_store(met.host, met.port)
            store = served[0] if served else open_store(met.host, met.port)
    except dist.DistError as error:
        raise LaunchError(
            f"rank {launch.rank} on {node_name()} cannot use the job's store: "
            f"{str(error).splitlines()[0]}; the nodes must reach each other at every port",
            exit_code=1,
        ) from None
    return store, HeartbeatMonitor(own, launch.rank, met.names, seconds)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """End the process if what is inside takes longer.

    torch's client of a stopped store waits without an end, and lets no other thread run.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # sys.stderr may be no file
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _allow_connections(count: int) -> None:
    """Raise this process's limit of open files: rank 0 has some connections with every process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft if soft == resource.RLIM_INFINITY else max(soft, count + 1024)
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
    global _monitor
    if _monitor is not None:
        _monitor.close()
        _monitor = None
    close_meeting()
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
