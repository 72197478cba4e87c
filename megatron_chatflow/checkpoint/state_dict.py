"""What a checkpoint holds of model, optimizer and running mean, in megatron-core's terms.

`saver.py` writes the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.checkpoint import compatibility, integrity, main_parameters, optimizer_state
from megatron_chatflow.checkpoint.ema import WeightAverage, mean_instead
from megatron_chatflow.checkpoint.loading import load as load_state
from megatron_chatflow.checkpoint.safe_unpickle import missing_shard
from megatron_chatflow.checkpoint.saver import SaveError, Saver
from megatron_chatflow.checkpoint.selection import check_running_mean
from megatron_chatflow.checkpoint.tensor_reader import CheckpointReader
from megatron_chatflow.errors import CheckpointError


def _metadata() -> dict[str, Any]:
    """Return the metadata of optimizer state that any layout loads.

    A new dictionary each time: megatron-core puts groups into it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _unwrap(chunk: Any) -> MegatronModule:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _weights(model: list[MegatronModule]) -> dict[str, Any]:
    """The sharded state dict of each chunk under the name that megatron-core looks for."""
    return {
        name: _unwrap(chunk).sharded_state_dict(metadata=_metadata())
        for name, chunk in zip(_names(model), model, strict=True)
    }


def _names(model: list[MegatronModule]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]


def sharded_state(
    model: list[MegatronModule],
    optimizer: MegatronOptimizer | None,
    average: WeightAverage | None,
    *,
    is_loading: bool = False,
) -> dict[str, Any]:
    """Return what a checkpoint holds, as megatron-core's sharded state dict.

    It has the weights and, where they are given, optimizer state and running mean.

    Called by every rank: the weights and the optimizer's state are gathered where they are spread.

    Raises SaveError where what is to be saved of weights and optimizer does not match.
    """
    if not is_loading:
        gather_weights(model)
        if optimizer is not None:
            optimizer_state.initialize_state(optimizer)
    weights = _weights(model)
    fp8 = {main_parameters.FP8_WEIGHTS: main_parameters.has_fp8_weights([*model])}
    state = dict(weights) | ({} if is_loading else {"content_metadata": _metadata() | fp8})
    if optimizer is not None:
        # megatron-core finds a parameter's shard by walking the model part of the very same
        # dictionary.
        with main_parameters.packed_offsets(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(
                dict(weights), is_loading=is_loading, metadata=_metadata()
            )
        if not is_loading and (
            names := main_parameters.find_differences(weights, state["optimizer"])
        ):
            raise SaveError(
                "the checkpoint is not saved: the optimizer's float32 parameters are not "
                "the weights "
                f"in {main_parameters.describe(names)}; please report this"
            )
    if average is not None:
        state |= {
            f"ema/{name}": average.sharded_state(entries) for name, entries in weights.items()
        }
    return state


def gather_weights(model: list[MegatronModule]) -> None:
    """Complete the weights of every rank.

    Under --overlap-param-gather what the optimizer changed is otherwise gathered in the next
    forward pass.
    """
    chunk: Any  # a MegatronModule, or the DistributedDataParallel around it
    for chunk in model:
        if getattr(chunk, "ddp_config", None) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def save(
    run: Path,
    iteration: int,
    model: list[MegatronModule],
    optimizer: MegatronOptimizer | None,
    state: dict[str, Any],
    average: WeightAverage | None = None,
) -> Path:
    """Write ``RUN/iter_<iteration>`` and then point to it (`Saver`); return the folder.

    Called by every rank. `state` is plain data for state.json.
    """
    with Saver(run) as saver:
        saver.begin(iteration, sharded_state(model, optimizer, average), state)
        saved = saver.poll(wait=True)
        assert saved is not None, "the save that has begun ends"
        return saved.folder


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where nothing is; all ranks get the same answer.

    The size and SHA-256 of every file are compared, read once among all ranks, and the files that
    ``.metadata`` refers to must be among them.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = sorted(path.name for path in folder.iterdir())[rank::size]
    answers: list[str | None] = [None] * size
    found = integrity.damage(folder, lambda name, _: name in mine)
    if rank == 0 and found is None:
        found = missing_shard(folder)
    torch.distributed.all_gather_object(answers, found)
    return next(filter(None, answers), None)


def load(
    folder: Path,
    model: list[MegatronModule],
    optimizer: MegatronOptimizer | None,
    average: WeightAverage | None = None,
    *,
    verified: bool = False,
) -> dict[str, Any] | None:
    """Load weights, and optimizer state and running mean where given, from any layout.

    Returns the settings that the optimizer was saved with, those of its first group. They are not
    in effect, those of `optimizer` are.

    Raises ConfigError for a checkpoint that is damaged, or whose pickles hold what does not belong
    there. `verified`: `find_damage` was asked before.
    """
    reader = _open(folder, verified)
    if optimizer is not None:
        main_parameters.check_saved(reader)
    for part in getattr(optimizer, "chained_optimizers", []):
        # Without apex or Transformer Engine the distributed optimizer asserts that it has stepped;
        # what the step leaves is overwritten below.
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
    group = None
    wanted = sharded_state(model, optimizer, average, is_loading=True)
    compatibility.check_weights(reader, {name: wanted[name] for name in _names(model)})
    state = {"optimizer": wanted.pop("optimizer")} if optimizer is not None else {}
    if optimizer is not None:
        chained: Any = optimizer  # megatron-core chains the optimizers of a run
        (part,) = chained.chained_optimizers
        own_form = optimizer_state.layout_of(part)
        saved_form = optimizer_state.layout_in(reader.common()["optimizer"])
        optimizer_state.ask_for(wanted, state, saved_form, own_form)
    loaded = load_state(reader, wanted)
    _load_weights(model, loaded)
    if optimizer is not None:
        # Separately, for it may ask for the weights too: they are the float32 parameters of some
        # checkpoints.
        saved = load_state(reader, state)["optimizer"]
        optimizer_state.hand_over(saved, part, saved_form)
        inner = saved if own_form == optimizer_state.OptimizerLayout.FP32 else saved["optimizer"]
        group = dict(inner["param_groups"][0])
        with _own_settings(part):
            _load_optimizer(part, saved)
    if average is not None:
        for name, entries in _weights(model).items():
            average.restore(entries, loaded[f"ema/{name}"])
    return group


def check_unrecorded(folder: Path, vocab_size: int | None, optimizer: str | None) -> None:
    """Compare, by a checkpoint's tensors, what it does not record; None is not compared.

    Raises ConfigError where it differs.
    """
    if vocab_size is None and optimizer is None:
        return
    reader = CheckpointReader(folder)
    if vocab_size is not None:
        compatibility.check_vocabulary(reader, vocab_size)
    if optimizer is not None:
        compatibility.check_optimizer_kind(reader, optimizer)


def load_average(folder: Path, model: list[MegatronModule]) -> None:
    """Load the running mean of the weights (--ema-decay) of a checkpoint in place of its weights.

    Raises ConfigError where the checkpoint has none, or is damaged.
    """
    reader = _open(folder, verified=False)
    check_running_mean(folder)
    compatibility.check_weights(reader, _weights(model))
    wanted = {name: mean_instead(entries) for name, entries in _weights(model).items()}
    _load_weights(model, load_state(reader, wanted))


def _open(folder: Path, verified: bool) -> CheckpointReader:
    if not verified and (wrong := find_damage(folder)):
        raise CheckpointError(
            f"{folder} is damaged: {wrong}; load another checkpoint with --ckpt-step"
        )
    return CheckpointReader(folder)


def _load_weights(model: list[MegatronModule], loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_names(model), model, strict=True):
        _unwrap(chunk).load_state_dict(loaded[name])


@contextlib.contextmanager
def _own_settings(part: MegatronOptimizer) -> Iterator[None]:
    """Inside, the state of an optimizer is loaded; its groups keep their settings.

    Otherwise rates, betas, epsilon and the choice of kernels would be the checkpoint's:
    megatron-core's schedule, too, takes its peak and its floor from the groups.
    """
    kept = ("params", "step")
    settings = [{k: v for k, v in group.items() if k not in kept} for group in part.param_groups]
    yield
    for group, own in zip(part.param_groups, settings, strict=True):
        for key in set(group) - set(own) - set(kept):
            del group[key]
        group.update(own)


def _load_optimizer(part: MegatronOptimizer, saved: dict[str, Any]) -> None:
    if not isinstance(part, DistributedOptimizer):
        part.load_state_dict(saved)
        return
    # torch's AdamW keeps a `step` next to the moments. megatron-core's reader of this form
    # looks for it among the saved tensors, where it is not, and gives every parameter the same
    # tensor, which each of them then counts up; so it is set aside and handed out as copies.
    parameters = saved.pop("param_state")
    part.load_state_dict(saved)
    steps = {
        parameter: state.pop("step")
        for parameter, state in part.optimizer.state.items()
        if "step" in state
    }
    part.load_parameter_state_from_fully_reshardable(parameters)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step.clone()
