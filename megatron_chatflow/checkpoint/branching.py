"""Which checkpoint `train --branch-from` loads: the trunk's at first, then the branch's own.

A branch is a run in its own directory that continues an iteration of another run. The same
command starts it and resumes it, so that a job that is requeued continues. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_chatflow.checkpoint import integrity, lineage
from megatron_chatflow.checkpoint.lineage import UNKNOWN, Lineage, Origin
from megatron_chatflow.checkpoint.run_directory import (
    METRICS,
    complete_iterations,
    find_intact_checkpoint,
    iteration_folder,
)
from megatron_chatflow.errors import CheckpointError, ConfigError


def find_branch_checkpoint(
    trunk: Path, iteration: int, branch: Path, damaged: Mapping[Path, str] = MappingProxyType({})
) -> tuple[Path, list[str]]:
    """Return the checkpoint that the command of a branch loads, and what the user should see.

    Args:
        trunk: --load.
        iteration: --branch-from.
        branch: --save.
        damaged: checkpoints that were found damaged, with what is wrong.

    Raises:
        ConfigError: the two directories are one, `branch` holds another run, or the trunk has no
            intact checkpoint of the iteration.
    """
    recorded = _recorded_lineage(branch)
    if os.path.realpath(trunk) == os.path.realpath(branch):
        # The command that a branch prints to resume it has --load BRANCH.
        parent = None if recorded is None else recorded.parent
        if parent is None or parent.iteration != iteration:
            raise ConfigError(
                f"save {branch} is the run to branch from; give --save a new folder, as a branch "
                "has its own run directory"
            )
        trunk = Path(parent.run)
    else:
        _check_is_this_branch(branch, recorded, trunk, iteration)
    if complete_iterations(branch):
        found, notes = find_intact_checkpoint(branch, None, damaged)
        assert found is not None, "there are checkpoints: one is found, or it is an error"
        return found, notes
    return _trunk_checkpoint(trunk, iteration, damaged), [
        f"branch of {trunk} at iteration {iteration}, in {branch}"
    ]


def _trunk_checkpoint(trunk: Path, iteration: int, damaged: Mapping[Path, str]) -> Path:
    there = sorted(complete_iterations(trunk))
    if iteration not in there:
        listed = f"one of {', '.join(map(str, there))}" if there else "a run that has checkpoints"
        flag = "--branch-from" if there else "--load"
        raise CheckpointError(
            f"branch_from is {iteration}, and load {trunk} has no complete checkpoint of it; "
            f"give {flag} {listed}"
        )
    folder = iteration_folder(trunk, iteration)
    if wrong := damaged.get(folder) or integrity.damage_at_first_sight(folder):
        raise CheckpointError(
            f"branch_from is {iteration}, and {folder} is damaged: {wrong}; give --branch-from "
            f"another of {', '.join(map(str, there))}"
        )
    return folder


def _recorded_lineage(run: Path) -> Lineage | None:
    """Return the lineage of the run in a directory; None where it holds no run."""
    if (recorded := lineage.read_course(run)) is not None:
        return recorded
    for iteration in complete_iterations(run):
        if (found := lineage.read_lineage(iteration_folder(run, iteration))) is not None:
            return found
    return UNKNOWN if complete_iterations(run) or (run / METRICS).exists() else None


def _check_is_this_branch(
    branch: Path, recorded: Lineage | None, trunk: Path, iteration: int
) -> None:
    """Refuse a directory that holds another run than the branch of `iteration` of `trunk`."""
    if recorded is None:
        return
    parent = recorded.parent
    if parent is None:
        what = "a run that is not a branch"
    elif parent.iteration != iteration or not _is_same_run(parent, trunk, iteration):
        what = f"a branch of iteration {parent.iteration} of {parent.run}"
    else:
        return
    raise ConfigError(
        f"save {branch} holds {what}, not one of iteration {iteration} of {trunk}; give --save a "
        f"new folder, or resume that run with --load {branch} and without --branch-from"
    )


def _is_same_run(parent: Origin, trunk: Path, iteration: int) -> bool:
    """Whether `trunk` is the run of `parent`; it may have moved, or lost that checkpoint."""
    found = lineage.read_lineage(iteration_folder(trunk, iteration))
    if found is None or UNKNOWN.branch in (found.branch, parent.branch):
        return os.path.realpath(trunk) == parent.run
    return found.branch == parent.branch
