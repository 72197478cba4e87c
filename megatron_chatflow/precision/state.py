"""The state of delayed scaling as it stands in checkpoints: the bytes that Transformer Engine's layers keep under `_extra_state`.

Written in the form of Transformer Engine 1 (no recipe object, so nothing of that library is needed to write it), which release 2 still reads:
it takes such a state for delayed scaling with a history of 1024 rows and cuts that to the run's own length. Both forms are read, by an unpickler
that knows plain data, tensors and the names of Transformer Engine's recipes, and stops at everything else.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import torch

ROWS = 1024
"""History rows of a written state, at least: zeros beyond the run's own length. Transformer Engine stops at a state with more."""
TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
_RECIPES = {
    "transformer_engine.common.recipe": (
        *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"),
        *("Format", "_FormatHelper", "MMParams", "QParams"),
    ),
    "megatron.core.extensions.transformer_engine": ("TEDelayedScaling",),
}
"""{module: names} that pickled recipes of Transformer Engine 2 refer to."""


def pack(tensors: dict[str, torch.Tensor], *, hybrid: bool) -> torch.Tensor:
    """uint8 [bytes] of `TENSORS`: scales [n] and histories [length, n]."""
    state: dict[str, Any] = {name: _resized(value, max(ROWS, len(value))) if value.dim() == 2 else value.clone() for name, value in tensors.items()}
    state["extra_fp8_variables"] = {"num_gemms": 1}
    if not hybrid:
        # Transformer Engine would take the state for hybrid and go on with other formats; at a recipe it does not know it stops.
        state["recipe"] = "delayed e4m3"
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def read(state: torch.Tensor | None) -> dict[str, Any]:
    """What a state holds, recipes as empty stand-ins; nothing of it is run.

    Raises:
        pickle.UnpicklingError: it refers to something that no state of Transformer Engine's does. Its own reader would run that.
    """
    return _Unpickler(io.BytesIO(state.numpy().tobytes())).load() if state is not None and state.numel() else {}


def unpack(state: torch.Tensor | None, length: int) -> dict[str, torch.Tensor] | None:
    """The tensors of a state with histories of `length` rows, or None where it holds none (bfloat16, or a recipe without state)."""
    found = read(state)
    if "scale_fwd" not in found:
        return None
    return {name: _resized(found[name], length) if found[name].dim() == 2 else found[name] for name in TENSORS}


def _resized(history: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows are cut from the end, and zeros added there, as Transformer Engine does when a history's length is changed."""
    resized = torch.zeros(rows, history.shape[1])
    kept = min(rows, len(history))
    resized[:kept] = history[:kept]
    return resized


class _Recipe:
    """Stands for an object of `_RECIPES`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    _KNOWN = {
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): lambda data: torch.load(io.BytesIO(data), weights_only=True),
        ("collections", "OrderedDict"): OrderedDict,
        **{(module, name): _Recipe for module, names in _RECIPES.items() for name in names},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self._KNOWN[module, name]
