"""Checkpoint folders of a few bytes: all that the run directory looks at, and nothing for torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint import integrity
from megatron_chatflow.checkpoint.lineage import Lineage
from megatron_chatflow.checkpoint.run_directory import POINTER, iteration_folder


def write_checkpoint(
    run: Path, iteration: int, course: Lineage | None, *, pointed: bool = True, **state: Any
) -> Path:
    """A complete checkpoint, in the place of one that is there; `course` None is version 0.1's."""
    folder = iteration_folder(run, iteration)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp"):
        (folder / name).write_text(f"{name} {iteration}")
    state |= {"iteration": iteration}
    if course is not None:
        state |= {"sealed": True, "lineage": course.plain()}
    (folder / "state.json").write_text(json.dumps(state))
    if course is not None:
        integrity.write_manifest(folder, integrity.record_files(folder))
    if pointed:
        (run / POINTER).write_text(f"{iteration}\n")
    return folder
