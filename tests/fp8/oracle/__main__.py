"""The reference against Transformer Engine's own Python.

This is a program because the emulation changes imports for the entire process.
``python -m tests.fp8.oracle quick|full RECIPE ...`` prints one JSON object, {recipe: {layout:
{part: what was found}}}; under torchrun's variables it runs on several ranks, and the first one
prints. The models are made by the package itself, once with each implementation.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

from tests.fp8.oracle import layers, models
from tests.fp8.oracle.settings import RECIPES, settings


def main(extent: str, recipes: list[str]) -> None:
    """Load the emulation, create the process groups, run the comparisons and print the result."""
    warnings.filterwarnings("ignore")
    from megatron_chatflow.distributed import cuda_shim, process_groups
    from megatron_chatflow.distributed.launch import read_launch

    cuda_shim.install()
    import torch

    from tests.fp8.emulation import loader

    loader.load((10, 0) if "mxfp8" in recipes else (9, 0))
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    torch.set_num_threads(1)
    launch = read_launch()
    process_groups.initialize(launch, settings("", launch.world_size).parallel, 3)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    models.replace_attention()
    found: dict[str, Any] = {}
    for recipe in recipes:
        for name, layout in {"plain": "", "sequence_parallel": "--sequence-parallel"}.items():
            if not layout or launch.world_size > 1:
                FP8GlobalStateManager.reset()
                config = settings(f"{RECIPES[recipe]} {layout}", launch.world_size)
                chosen = parts(recipe, launch.world_size, extent)
                found.setdefault(recipe, {})[name] = {
                    name: part(config) for name, part in chosen.items()
                }
    process_groups.shut_down()
    if launch.rank == 0:
        print(json.dumps(found))


def parts(recipe: str, world_size: int, extent: str) -> dict[str, Callable[[Any], Any]]:
    """Return the comparisons to run, by name."""
    found: dict[str, Callable[[Any], Any]] = {}
    if recipe != "bf16":
        found["linear"] = layers.linears
    if world_size > 1:
        return found
    found["keys"] = models.checkpoint_keys
    if recipe != "bf16":
        found["log"] = layers.contract
    if recipe == "delayed":
        found |= {
            "histories": layers.histories,
            "states": layers.exchanged_states,
            "validation": models.validation,
        }
    elif recipe != "bf16":
        found["bf16_layers"] = models.bf16_layers
    if recipe == "tensorwise":
        found["nvidia_reference"] = layers.against_their_reference
    if extent == "full":
        found |= {"curves": models.curves, "checkpoints": models.checkpoints}
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
