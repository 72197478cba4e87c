"""One process takes the part of any rank of a job of any size.

Its process group communicates with no other process, and its tensors have no memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_chatflow.config.pipeline_layout import virtual_pipeline_size
from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.distributed import cuda_shim

_NEW = (
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "as_tensor",
    "randn",
    "rand",
    "randint",
    "randperm",
    "linspace",
)


class _WithoutMemory(TorchFunctionMode):
    """Every new tensor is on the meta device, whatever device was asked for.

    ``torch.device("meta")`` as a context leaves alone the calls that name a device.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", None) in _NEW:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def hide_devices() -> None:
    """Hide CUDA devices from this process, so that fake ranks are the same on every machine.

    Called before torch first looks for them.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cuda_shim.install()


@contextlib.contextmanager
def rehearse(
    rank: int, world_size: int, parallel: ParallelSettings, num_layers: int
) -> Iterator[None]:
    """Inside, this process is `rank` of `world_size`; what is built has shapes but no memory.

    megatron-core's groups exist over those ranks.

    Collectives return at once and move nothing.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    virtual = virtual_pipeline_size(parallel, num_layers)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            virtual if virtual > 1 else None,
            create_gloo_process_groups=False,
        )
        with _WithoutMemory():
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
