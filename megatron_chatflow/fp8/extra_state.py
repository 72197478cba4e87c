"""The state of delayed scaling in checkpoints.

It is the bytes that Transformer Engine's layers keep under `_extra_state`.

Written in the form of Transformer Engine 1 (no recipe object, so nothing of that library is needed
to write it), which release 2 still reads: it takes such a state for delayed scaling with a history
of 1024 rows and cuts that to the run's own length. Both forms are read, by an unpickler that knows
plain data, tensors and the names of Transformer Engine's recipes, and stops at everything else.
What a checkpoint holds is read and written again before a layer gets it.
"""

from __future__ import annotations

import io
import pickle
from functools import partial
from typing import Any, ClassVar

import torch

from megatron_chatflow.serialization.strict_pickle import Maker, StrictUnpickler
from megatron_chatflow.serialization.torch_file import PICKLED_TENSORS

ROWS = 1024
"""History rows of a written state, at least: zeros beyond the run's own length. Transformer Engine
stops at a state with more.
"""
TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
_RECIPES = {
    "transformer_engine.common.recipe": (
        *(
            "DelayedScaling",
            "Float8CurrentScaling",
            "Float8BlockScaling",
            "MXFP8BlockScaling",
            "NVFP4BlockScaling",
        ),
        *("Format", "_FormatHelper", "MMParams", "QParams"),
    ),
    "megatron.core.extensions.transformer_engine": ("TEDelayedScaling",),
}
"""{module: names} that pickled recipes of Transformer Engine 2 refer to."""


def pack(tensors: dict[str, torch.Tensor], *, hybrid: bool) -> torch.Tensor:
    """uint8 [bytes] of `TENSORS`: scales [n] and histories [length, n]."""
    state: dict[str, Any] = {
        name: _resized(value, max(ROWS, len(value))) if value.dim() == 2 else value.clone()
        for name, value in tensors.items()
    }
    state["extra_fp8_variables"] = {"num_gemms": 1}
    if not hybrid:
        # Transformer Engine would take the state for hybrid and continue with other formats; at a
        # recipe it does not know it stops.
        state["recipe"] = "delayed e4m3"
    return _write(state)


def read(state: torch.Tensor | None) -> dict[str, Any]:
    """What a state holds, recipes as empty stand-ins; nothing of it is run.

    Raises:
        pickle.UnpicklingError: it refers to something that no state of Transformer Engine's does.
        Its own reader would run that.
    """
    if state is None:
        return {}
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise pickle.UnpicklingError("a layer's state is no bytes")
    if not state.numel():
        return {}
    data = state.contiguous().numpy().tobytes()
    found = StrictUnpickler(data, _KNOWN, {_Recipe: _Recipe.fill}).load()
    if not isinstance(found, dict):
        raise pickle.UnpicklingError("a layer's state is no dictionary")
    return found


def rewrite(state: torch.Tensor | None) -> torch.Tensor | None:
    """The same state in bytes of our own, for layers that unpickle it without restriction.

    Raises pickle.UnpicklingError as `read` does.
    """
    if not (found := read(state)):
        return state
    return _write(found)


def unpack(state: torch.Tensor | None, length: int) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a state with histories of `length` rows, or None where it holds none.

    It holds none in bfloat16, or in a recipe without state.
    """
    found = read(state)
    if "scale_fwd" not in found:
        return None
    return {
        name: _resized(found[name], length) if found[name].dim() == 2 else found[name]
        for name in TENSORS
    }


def _resized(history: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut rows from the end, or add zeros there.

    Transformer Engine does the same when a history's length is changed.
    """
    resized = torch.zeros(rows, history.shape[1])
    kept = min(rows, len(history))
    resized[:kept] = history[:kept]
    return resized


class _Recipe:
    """Replaces an object of `_RECIPES`."""

    def __init__(self, name: tuple[str, str], allocated: bool, *arguments: Any) -> None:
        self.name, self.allocated, self.arguments = name, allocated, arguments
        self.state: Any = None

    def fill(self, state: Any) -> None:
        self.state = state


_KNOWN = PICKLED_TENSORS | {
    (module, name): Maker(
        partial(_Recipe, (module, name), False), partial(_Recipe, (module, name), True)
    )
    for module, names in _RECIPES.items()
    for name in names
}


_Pickler: Any = pickle._Pickler  # not in the annotations of pickle


def _write(state: dict[str, Any]) -> torch.Tensor:
    content = io.BytesIO()
    _Writer(content, protocol=4).dump(state)
    return torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)


class _Writer(_Pickler):
    """Write equal states as equal bytes, and a `_Recipe` as the object that it replaces.

    torch pickles a tensor's storage under its address in memory, with the bytes that other tensors
    use; its zip format numbers storages, and a clone's storage has the tensor's bytes only.
    """

    dispatch: ClassVar = dict(_Pickler.dispatch)

    def _save_tensor(self, tensor: torch.Tensor) -> None:
        self.save_reduce(*tensor.clone().__reduce_ex__(self.proto), obj=tensor)

    dispatch[torch.Tensor] = _save_tensor

    def _save_storage(self, storage: torch.storage.TypedStorage) -> None:
        content = io.BytesIO()
        torch.save(storage, content)
        self.save_reduce(torch.storage._load_from_bytes, (content.getvalue(),), obj=storage)

    dispatch[torch.storage.TypedStorage] = _save_storage

    def _save_recipe(self, recipe: _Recipe) -> None:
        module, name = recipe.name
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.save(recipe.arguments)
        self.write(pickle.NEWOBJ if recipe.allocated else pickle.REDUCE)
        self.memoize(recipe)
        if recipe.state is not None:
            self.save(recipe.state)
            self.write(pickle.BUILD)

    dispatch[_Recipe] = _save_recipe
