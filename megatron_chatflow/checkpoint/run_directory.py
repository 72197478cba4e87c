"""The run directory as files: names, the pointer to the latest checkpoint, and its plain data.

Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint import integrity, lineage
from megatron_chatflow.checkpoint.lineage import Lineage, Origin, listed
from megatron_chatflow.config import load_values
from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.errors import ChatflowError, CheckpointError, ConfigError
from megatron_chatflow.utils.files import write_atomically
from megatron_chatflow.utils.user_files import load_json, read_text

POINTER = "latest_checkpointed_iteration.txt"
METRICS = "metrics.jsonl"


def read_settings(run: str | Path, *, keep_layout: bool = True) -> dict[str, Any]:
    """Return {setting: value} of a run directory's config.yaml, over which flags are laid.

    Args:
        run: The run directory (what was --save).
        keep_layout: False leaves out how the run was laid out over processes; its checkpoint loads
            into any layout.

    Raises:
        ConfigError: The folder has no config.yaml, or it cannot be read.
    """
    path = Path(run) / "config.yaml"
    if not os.path.isfile(path):  # also False for a path that is too long
        raise ConfigError(
            f"{run} is not a run directory: it has no config.yaml; give the folder that was "
            f"--save of a run"
        )
    values = load_values(path)
    if not keep_layout:
        for name in ParallelSettings.__dataclass_fields__:
            values.pop(name, None)
    return values


def iteration_folder(run: Path, iteration: int) -> Path:
    """Return the folder of an iteration's checkpoint."""
    return run / f"iter_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """The iteration of a checkpoint folder's name; None where it is another name."""
    match = re.fullmatch(r"iter_([0-9]{7,18})", name)
    iteration = int(match[1]) if match else None
    return iteration if iteration is not None and name == f"iter_{iteration:07d}" else None


def latest_iteration(run: Path) -> int | None:
    """Return the iteration that the pointer names, or None without a pointer.

    Raises CheckpointError for a damaged pointer.
    """
    path = run / POINTER
    try:
        with open(path, "rb") as file:
            content = file.read(100)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); make it a file with the number of a "
            f"complete "
            "iter_ folder"
        ) from None
    if not re.fullmatch(rb"\s*[0-9]{1,18}\s*", content):
        text = repr(content)[1:] if len(content) < 40 else f"{content[:40]!r:.60}..."[1:]
        raise CheckpointError(
            f"{path} holds {text}, not an iteration; write the number of a complete iter_ "
            f"folder into it"
        )
    return int(content)


def complete_iterations(run: Path) -> list[int]:
    """The iterations of all checkpoints in a run directory, newest first."""
    if not os.path.isdir(run):
        return []
    found = (
        iteration_of(path.name) for path in run.glob("iter_*") if (path / "state.json").is_file()
    )
    return sorted((iteration for iteration in found if iteration is not None), reverse=True)


def find_checkpoint(run: str | Path, ckpt_step: int | None) -> Path | None:
    """Return the checkpoint folder to load: of `ckpt_step`, else the latest; None if there is none.

    Raises ConfigError where the wanted one is missing, naming those that are there.
    """
    run = Path(run)
    iteration = ckpt_step if ckpt_step is not None else latest_iteration(run)
    if iteration is None and not (found := complete_iterations(run)):
        return None
    if iteration is None:
        raise CheckpointError(
            f"{run / POINTER} is missing; give --ckpt-step one of {listed(found)}"
        )
    folder = iteration_folder(run, iteration)
    if not (folder / "state.json").is_file():
        there = ", ".join(map(str, sorted(complete_iterations(run))))
        raise CheckpointError(
            f"{folder} is not a complete checkpoint; give --ckpt-step one of "
            f"{there or 'none: the directory has no checkpoint'}"
        )
    return folder


def find_intact_checkpoint(
    run: str | Path, ckpt_step: int | None, damaged: Mapping[Path, str]
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that training resumes from, and a message for each newer one skipped.

    Args:
        run: the run directory.
        ckpt_step: the iteration that the user asked for; None for the latest.
        damaged: checkpoints that were found damaged, with what is wrong; those found at first sight
        come on top.

    Raises:
        ConfigError: the one asked for is missing or damaged, or there are checkpoints and none is
        intact.
    """
    run = Path(run)
    if ckpt_step is not None:
        folder = find_checkpoint(run, ckpt_step)
        assert folder is not None, "the iteration that was asked for is found, or it is an error"
        wrong = damaged.get(folder) or integrity.damage_at_first_sight(folder)
        if wrong:
            raise CheckpointError(
                f"{folder} is damaged: {wrong}; give --ckpt-step another, or leave it out "
                f"for the latest that is intact"
            )
        return folder, []
    there, passed = complete_iterations(run), []
    try:
        latest = latest_iteration(run)
        if latest is None and not there:
            return None, []
        if latest is None:
            passed.append(f"{run / POINTER} is missing")
        elif latest not in there:
            passed.append(f"{run / POINTER} names iteration {latest}, which is not there")
    except ChatflowError as error:
        latest = None
        passed.append(str(error).split(";")[0])
    own = None if latest is None else lineage.read_lineage(iteration_folder(run, latest))
    course = own or lineage.read_course(run)
    intact: dict[int, Lineage] = {}
    left = []
    for iteration in there if latest is None else [i for i in there if i <= latest]:
        folder = iteration_folder(run, iteration)
        branch = own if iteration == latest else lineage.read_lineage(folder)
        if course is not None and branch is not None and not course.contains(branch, iteration):
            left.append(iteration)
        elif wrong := damaged.get(folder) or integrity.damage_at_first_sight(folder):
            passed.append(f"{folder} is damaged ({wrong})")
        elif branch is None:
            passed.append(f"{folder} is damaged (state.json holds no lineage)")
        else:
            intact[iteration] = branch
            if course is not None:
                break
    if left:
        passed.append(
            f"{listed(left)} of {run} {'are' if len(left) > 1 else 'is'} not on the course "
            f"of the run"
        )
    if not intact:
        raise CheckpointError(
            f"load {run} holds no intact checkpoint: {'; '.join(passed)}; restore one, or "
            f"start from scratch in another folder"
        )
    newest, branch = next(iter(intact.items()))
    others = [i for i, other in intact.items() if not branch.contains(other, i)]
    if others:
        raise CheckpointError(
            f"load {run}: the course that the run was on is not known ({'; '.join(passed)}), and "
            f"iteration {newest} does not continue {listed(others)}; give --ckpt-step one of them"
        )
    folder = iteration_folder(run, newest)
    return folder, [f"{sentence}: going back to {folder}" for sentence in passed]


def on_course(run: Path, course: Lineage, iterations: Iterable[int]) -> list[int]:
    """Those of `iterations` whose checkpoints are on a course, in their order."""
    return [
        iteration
        for iteration in iterations
        if course.contains(lineage.read_lineage(iteration_folder(run, iteration)), iteration)
    ]


def outdated(
    iterations: Collection[int], most_recent_k: int | None, retain_interval: int | None
) -> list[int]:
    """Return which checkpoints to remove.

    All are removed but the newest `most_recent_k` and the multiples of `retain_interval`.

    With neither none is removed. With `retain_interval` alone the two newest are kept: the latest,
    and one to go back to.
    """
    if most_recent_k is None and retain_interval is None:
        return []
    newest = sorted(iterations)[-(most_recent_k or 2) :]
    return sorted(
        i
        for i in iterations
        if i not in newest and not (retain_interval and i % retain_interval == 0)
    )


def outdated_on_course(
    run: Path,
    course: Lineage,
    iteration: int,
    most_recent_k: int | None,
    retain_interval: int | None,
) -> list[int]:
    """The `outdated` among the checkpoints up to `iteration` that are on a course.

    Those of later iterations and of other courses are neither counted nor removed.
    """
    if most_recent_k is None and retain_interval is None:  # nothing is read
        return []
    there = [i for i in complete_iterations(run) if i <= iteration]
    return outdated(on_course(run, course, there), most_recent_k, retain_interval)


def begin_course(
    run: Path, checkpoint: Path | None, iteration: int, weights: Path | None = None
) -> tuple[Lineage, list[str]]:
    """Record in a run directory where its run continues, before anything else of it is written.

    The pointer is set to what the run continues from. The branch is a new one where the run starts,
    is sent back or continues another directory's: what the branch has saved beyond `iteration` is
    then not on the course.

    Args:
        run: the directory that the run saves to.
        checkpoint: what it continues from; None where it starts.
        iteration: of `checkpoint`.
        weights: the checkpoint whose weights a run that starts takes.

    Returns:
        The lineage of what the run saves, and what the user should see.
    """
    there = {i: lineage.read_lineage(iteration_folder(run, i)) for i in complete_iterations(run)}
    if checkpoint is None:
        course = Lineage.new(weights)
    else:
        own = lineage.read_lineage(checkpoint) or lineage.UNKNOWN
        recorded = lineage.read_course(run)
        begun = recorded is not None and recorded.ancestors == own.leave(iteration).ancestors
        course = recorded if recorded is not None and begun else own
        is_here = checkpoint.parent.resolve() == run.resolve()
        is_latest = is_here and _points_to(run, iteration)
        later = any(i > iteration and course.contains(other, i) for i, other in there.items())
        if own == lineage.UNKNOWN and not begun or not is_latest or later:
            course = own.leave(iteration, None if is_here else Origin.of_checkpoint(checkpoint))
        if is_here and not is_latest:
            write_atomically(run / POINTER, f"{iteration}\n")
    lineage.write_course(run, course)
    left = [i for i, other in there.items() if other is not None and not course.contains(other, i)]
    if not left:
        return course, []
    return course, [
        f"not on the course of this run: {listed(left)} in {run}; only --ckpt-step loads "
        f"them, a save "
        "at the same iteration replaces them, nothing else removes them"
    ]


def _points_to(run: Path, iteration: int) -> bool:
    try:
        return latest_iteration(run) == iteration
    except ChatflowError:
        return False


def read_state(folder: Path) -> dict[str, Any]:
    """Return the plain data of a checkpoint: iteration, consumed samples, plan, schedule, data."""
    try:
        state = load_json(read_text(folder / "state.json"))
        if not isinstance(state, dict):
            raise CheckpointError("it holds no JSON object")
        return state
    except ChatflowError as error:
        raise CheckpointError(
            f"{folder / 'state.json'} cannot be read ({error}); load another checkpoint "
            f"with --ckpt-step"
        ) from None
