"""Lets an unmodified megatron-core run over gloo on a machine without CUDA.

megatron-core 0.16.1 allocates with ``device="cuda"``, asks ``torch.cuda`` for streams, events and
random states, and asserts that gradients are CUDA tensors. `install` points those calls at the CPU,
once, before megatron.core is first imported. On a machine with a CUDA device it does nothing, so
every other line of this project is the same on both.

A call that does not name CUDA behaves as it does without this file, for every user of torch in the
process: device contexts, TorchScript and ``Tensor.type`` included (only megatron-core's own modules
see ``torch.cuda.FloatTensor``).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import torch
from torch.jit._builtins import _find_builtin, _register_builtin
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_FACTORIES = (
    "empty", "zeros", "ones", "full", "arange", "tensor", "as_tensor", "randn", "rand", "randint",
    "randperm", "linspace",
)  # fmt: skip


def is_needed() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _redirect(factory: Any) -> Any:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    call.__module__, call.__qualname__ = "torch", factory.__name__  # how it is pickled
    _register_builtin(call, _find_builtin(factory))  # TorchScript knows a function by its identity
    return call


@functools.cache
def install() -> None:
    """Redirect megatron-core's CUDA calls to the CPU, once in a process.

    Does nothing where CUDA is available.
    """
    if not is_needed():
        return
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.empty_cache = lambda: None
    module: Any
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = (
            torch.default_generator.manual_seed
        )  # torch.manual_seed also records a stack trace for every kind of device: 3 ms a call
    cuda.default_generators = _Generators()
    cuda._lazy_call = lambda function, **kwargs: function()
    for name in ("Long", "Float", "Int", "Half", "BFloat16", "Double", "Byte"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    # cached: what ``with torch.device(...)`` acts on, by identity; it sees torch's functions, not
    # the wrappers
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _redirect(getattr(torch, name)))
    _install_tensor_methods()


def _install_tensor_methods() -> None:
    to, kind = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(to)
    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(CPU if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    @functools.wraps(kind)
    def tensor_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        """Return the type's name; megatron-core gets that of the CUDA type, which it asserts."""
        if dtype is None:
            name = kind(self)
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
                return name
            return (
                name if name.startswith("torch.cuda") else name.replace("torch.", "torch.cuda.", 1)
            )
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return kind(self, dtype, **kwargs)

    tensor: Any = torch.Tensor
    tensor.to, tensor.type = tensor_to, tensor_type
