"""What the folder of a sweep holds: settings, finished runs, the table, and who works in it."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint.run_directory import complete_iterations, latest_iteration
from megatron_chatflow.config import Config, load_values, to_yaml
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.planner.laws.run_records import records_of_run
from megatron_chatflow.planner.laws.run_table import RunRecord, write_table
from megatron_chatflow.planner.sweep_file import Sweep
from megatron_chatflow.planner.sweep_plan import PlannedRun, curriculum_path
from megatron_chatflow.utils.files import unwritable, write_atomically
from megatron_chatflow.utils.user_files import dump_yaml, load_yaml, read_text

TABLE = "runs.csv"
SETTINGS = "settings.yaml"
"""In a run directory: what `train` gets as --config."""
LOG = "train.log"
"""In a run directory: what `train` printed, of all its starts."""
_TAIL = 1 << 16
_ITERATION = re.compile(rb'^\{"iteration": ([0-9]{1,15}),', re.M)


@contextmanager
def exclusive(folder: Path, name: str = "sweep.lock", *, wait: bool = False) -> Iterator[None]:
    """Hold the folder of a sweep; the system releases it when this process ends.

    Args:
        folder: of the sweep.
        name: of the file in it that is locked.
        wait: whether to wait for another process that holds it.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "a+", encoding="utf-8")  # noqa: SIM115  closed below
    except OSError as error:
        raise unwritable("runs", folder, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"runs {folder}: another sweep works in it (process {file.read().strip()}); wait "
                "until it ends, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def prepare(sweep: Sweep, runs: Iterable[PlannedRun]) -> None:
    """Write the curricula, and the settings of every run into its directory.

    Raises:
        ConfigError: a run that has begun has other settings or another curriculum.
    """
    runs = list(runs)
    begun = [run for run in runs if complete_iterations(sweep.runs / run.name)]
    for share, content in sweep.curricula.items():
        path, text = curriculum_path(sweep, share), dump_yaml(content)
        old = read_text(path) if path.exists() else text
        trained = [run.name for run in begun if run.share == share]
        if trained and load_yaml(old) != load_yaml(text):
            raise ConfigError(
                f"{sweep.source}: the curriculum of share {share or 'base'!r} is not that of "
                f"{path}, with which {trained[0]} was trained; restore it, or give another name "
                "to the share or another folder to runs"
            )
        if old != text or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    for run in runs:
        path, text = sweep.runs / run.name / SETTINGS, to_yaml(run.written)
        if run in begun:
            _check_same(sweep, run, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or read_text(path) != text:
            write_atomically(path, text)


def _check_same(sweep: Sweep, run: PlannedRun, path: Path) -> None:
    """Refuse a sweep in which a run that has begun has other settings now."""
    if not path.exists():
        raise ConfigError(
            f"{path.parent} holds a run that is not of this sweep; give another folder to runs"
        )
    written = Config().replace(**load_values(path))
    start = written.checkpoint.load if written.checkpoint.finetune else None
    before = dataclasses.replace(run, written=written, start=start).identity()
    for name, value in run.identity().items():
        if before[name] != value:
            raise ConfigError(
                f"{sweep.source}: {run.name} was trained with {name} {before[name]} and has "
                f"{value} now; restore it, give another folder to runs, or remove {path.parent}"
            )


def command_words(run: PlannedRun, folder: Path) -> list[str]:
    """Return what follows ``train`` to start a run, or to resume it from its last checkpoint."""
    words = ["--config", str(folder / SETTINGS)]
    if run.start is not None and complete_iterations(folder):
        words += ["--load", str(folder), "--no-finetune"]
    return words


def is_finished(run: PlannedRun, folder: Path) -> bool:
    """Return whether a run has its last checkpoint and, if it is in the table, its losses."""
    try:
        if latest_iteration(folder) != run.iterations:
            return False
        return run.is_leg or records_of_run(folder)[0].tokens == run.tokens
    except ChatflowError:  # damaged: `train` decides what to do
        return False


def iterations_done(folder: Path) -> int:
    """Return the last iteration in metrics.jsonl; 0 without one."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            found = _ITERATION.findall(file.read())
    except OSError:
        return 0
    return int(found[-1]) if found else 0


class Table:
    """The table of a sweep: the records of its finished runs, in the order of the plan."""

    def __init__(self, sweep: Sweep, runs: Iterable[PlannedRun]) -> None:
        """Begin without records."""
        self._sweep = sweep
        self._runs = [run for run in runs if not run.is_leg]
        self._records: dict[str, list[RunRecord]] = {}

    def add(self, run: PlannedRun) -> None:
        """Read the records of a finished run; a leg of a trunk has none."""
        if not run.is_leg:
            found = records_of_run(self._sweep.runs / run.name)
            self._records[run.name] = [_in_sweep(self._sweep, run, record) for record in found]

    def write(self) -> None:
        """Write the table, if it has records.

        Raises:
            ConfigError, WriteError: it cannot be written.
        """
        found = [r for run in self._runs for r in self._records.get(run.name, ())]
        if not found:
            return
        try:
            write_table(self._sweep.runs / TABLE, found)
        except OSError as error:
            raise unwritable("runs", self._sweep.runs, error) from None

    def __str__(self) -> str:
        """Return what was written where."""
        count = sum(map(len, self._records.values()))
        if not count:
            return "no run has finished, so there is no table yet"
        return (
            f"table of {len(self._records)} of {len(self._runs)} runs, {count} records: "
            f"{self._sweep.runs / TABLE}"
        )


def _in_sweep(sweep: Sweep, run: PlannedRun, record: RunRecord) -> RunRecord:
    """Return the record with what only the sweep knows: the target and the languages to keep."""
    changes: dict[str, Any] = {"name": run.name}
    if sweep.target is not None:
        changes["share"] = record.mixture.get(sweep.target, 0.0)
    if sweep.keep:
        changes["replay"] = min(1.0, sum(record.mixture.get(name, 0.0) for name in sweep.keep))
    return dataclasses.replace(record, **changes)
