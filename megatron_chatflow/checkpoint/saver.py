"""Save one checkpoint at a time: write it under another name, flush it to disk, then publish it.

In the background where asked.

RUN/iter_0000100.partial-<n>/           while it is written; the next save removes the rest of a
                                        killed one
RUN/iter_0000100/                       shards of weights and optimizer, for any layout, with
                                        state.json and manifest.json
RUN/latest_checkpointed_iteration.txt   written last, atomically: what it names is complete
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

from megatron_chatflow.checkpoint.integrity import REQUIRED, check_files, write_manifest
from megatron_chatflow.checkpoint.lease import Lease, LeaseLostError
from megatron_chatflow.checkpoint.lineage import Lineage
from megatron_chatflow.checkpoint.run_directory import POINTER, iteration_folder, outdated_on_course
from megatron_chatflow.checkpoint.save_strategy import HashedSaveStrategy, results_of_rank
from megatron_chatflow.checkpoint.shared_memory import without_views
from megatron_chatflow.checkpoint.writer_process import WriterProcess
from megatron_chatflow.errors import CheckpointError
from megatron_chatflow.utils.files import (
    WriteError,
    record_file,
    record_open_file,
    sync_folder,
    write_atomically,
)


class SaveError(WriteError):
    """A checkpoint could not be written; earlier ones are unchanged. Raised on every rank alike."""


@dataclass
class _Writing:
    iteration: int
    partial: Path
    state: dict[str, Any]
    begin: float
    problem: str | None = None
    common: dict[str, Any] | None = None
    """Size and SHA-256 of common.pt, which the first rank writes."""
    seconds: float = 0.0
    """How long the training stood still for it."""


@dataclass
class Saved:
    """A published checkpoint."""

    folder: Path
    seconds: float
    """From the beginning to the end."""
    stall: float
    """How long the training stood still meanwhile."""


class Saver:
    """Writes the checkpoints of a run directory.

    Every rank calls every method alike, except `settle` and `close`.
    """

    def __init__(
        self,
        run: Path,
        most_recent_k: int | None = None,
        retain_interval: int | None = None,
        lease: Lease | None = None,
    ) -> None:
        """Start the process that writes.

        Made before process groups and weights exist, it shares nothing of them.

        Args:
            run: the run directory; it need not be there.
            most_recent_k: how many of the newest checkpoints are kept; None for all.
            retain_interval: checkpoints of its multiples are kept as well.
            lease: that of `run`, checked before anything there is changed; None leaves it out.
        """
        self._run, self._most_recent_k, self._retain_interval = run, most_recent_k, retain_interval
        self._lease = lease
        self._writer = WriterProcess()
        self._queue = AsyncCallsQueue(persistent=True)
        self._queue.persistent_caller = self._writer
        self._writing: _Writing | None = None
        self._saved: Saved | None = None
        self._sweeper: threading.Thread | None = None

    def __enter__(self) -> Saver:
        """Return the saver."""
        return self

    def __exit__(self, *args: Any) -> None:
        """End the process that writes."""
        self.close()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None

    def begin(self, iteration: int, sharded_state: dict[str, Any], state: dict[str, Any]) -> None:
        """Begin to write ``RUN/iter_<iteration>``.

        What `sharded_state` holds may change when `settle` returns.

        Args:
            iteration: iterations done.
            sharded_state: megatron-core's sharded state dict. It is taken apart.
            state: plain data for state.json.

        Raises:
            SaveError: the folder cannot be made.
            LeaseLostError: the run directory is another run's by now.
        """
        assert not self.busy, "one checkpoint at a time"
        begin = time.perf_counter()
        self._writing = _Writing(iteration, self._make_partial(iteration), state, begin)
        sharded, common = save_preprocess(sharded_state)
        try:
            TorchCommonSaveStrategy("torch", 1).save_common(common, str(self._writing.partial))
            if torch.distributed.get_rank() == 0:
                with open(self._writing.partial / "common.pt", "rb", buffering=0) as file:
                    self._writing.common = record_open_file(file)
        except (
            OSError,
            RuntimeError,
        ) as error:  # reported at the end, on all ranks
            self._writing.problem = f"common.pt: {error}"
        assert isinstance(sharded, dict), "the state of a run is a dictionary"
        without_views(sharded)
        folder: Any = str(self._writing.partial)  # megatron-core annotates a Path, and passes this
        self._queue.schedule_async_request(
            HashedSaveStrategy(self._end).async_save(sharded, folder)
        )
        self._writing.seconds = time.perf_counter() - begin

    def settle(self) -> None:
        """Wait until what is being saved is copied.

        Call it before any of it changes; it needs no other rank.
        """
        begin = time.perf_counter()
        self._writer.settle()
        if self._writing is not None:
            self._writing.seconds += time.perf_counter() - begin

    def poll(self, *, wait: bool = False) -> Saved | None:
        """Return the checkpoint once it is written on all ranks and published; until then None.

        With `wait`, return when it is.

        Raises:
            SaveError: it could not be written.
            LeaseLostError: the run directory is another run's by now.
        """
        if self._writing is None:
            return None
        begin = time.perf_counter()
        self._queue.maybe_finalize_async_calls(blocking=wait)
        self._writing.seconds += time.perf_counter() - begin
        if self._saved is None:
            return None
        if wait:
            self._wait_for_sweeper()
        self._saved.seconds, self._saved.stall = (
            time.perf_counter() - self._writing.begin,
            self._writing.seconds,
        )
        saved, self._saved, self._writing = self._saved, None, None
        return saved

    def close(self) -> None:
        """Give up what is being written, and end the process that writes; needs no other rank."""
        self._writer.close()
        self._wait_for_sweeper()

    def _make_partial(self, iteration: int) -> Path:
        """Make a folder of a name that no earlier attempt had.

        What a killed run's writers still write goes to another folder.
        """
        answer: list[Any] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                self._run.mkdir(parents=True, exist_ok=True)
                self._wait_for_sweeper()
                self._check_lease()
                _sweep(self._run)
                folder = (
                    self._run
                    / f"{iteration_folder(self._run, iteration).name}.partial-{time.time_ns():x}"
                )
                folder.mkdir()
                answer = [folder]
            except LeaseLostError as error:
                answer = [error]
            except OSError as error:
                answer = [_cannot_write(iteration, error)]
        torch.distributed.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _end(self, writer: Any, metadata: Any) -> None:
        """All ranks have written, or failed to: publish, or clean up and raise on all of them."""
        writing, rank = self._writing, torch.distributed.get_rank()
        assert writing is not None, "megatron-core calls this after a save began"
        everyone: Any = [None] * torch.distributed.get_world_size() if rank == 0 else None
        torch.distributed.gather_object(
            results_of_rank(writer, self._writer.answer), everyone, dst=0
        )
        verdict: list[Exception | None] = [None]
        if rank == 0:
            problems = [
                f"rank {i}: {problem}" for i, (problem, _, _) in enumerate(everyone) if problem
            ]
            try:
                if writing.problem or problems:
                    raise OSError(writing.problem or "; ".join(problems))
                self._publish(writing, writer, metadata, everyone)
            except (OSError, CheckpointError, LeaseLostError) as error:
                shutil.rmtree(writing.partial, ignore_errors=True)
                lost = isinstance(error, LeaseLostError)
                verdict = [error if lost else _cannot_write(writing.iteration, error)]
        torch.distributed.broadcast_object_list(verdict, src=0)
        if verdict[0]:
            self._writing = None
            raise verdict[0]
        self._saved = Saved(iteration_folder(self._run, writing.iteration), 0.0, 0.0)

    def _publish(self, writing: _Writing, writer: Any, metadata: Any, everyone: list[Any]) -> None:
        """Publish the checkpoint; what it raises leaves everything before unchanged."""
        partial, iteration = writing.partial, writing.iteration
        writer.finish(metadata, [results for _, results, _ in everyone])
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        write_atomically(
            partial / "state.json", json.dumps(writing.state | {"sealed": True}, indent=1)
        )
        records = {name: value for _, _, found in everyone for name, value in found.items()}
        for place in metadata.storage_data.values():
            written = records.get(place.relative_path, {"bytes": 0})["bytes"]
            if place.offset + place.length > written:
                raise CheckpointError(
                    f"a tensor is in {place.relative_path}, of which {written} bytes were written"
                )
        records |= {name: record_file(partial / name) for name in REQUIRED}
        if records["common.pt"] != writing.common:
            raise CheckpointError("common.pt is not what was written")
        check_files(partial, records)
        write_manifest(partial, records)
        folder, aside = iteration_folder(self._run, iteration), Path(f"{partial}.replaced")
        self._check_lease()
        if folder.exists():  # a damaged one, or one after which the run was sent back
            os.rename(folder, aside)
        try:
            os.rename(partial, folder)
            check_files(folder, records)  # once more under the name that nothing sweeps
        except (OSError, CheckpointError):
            if not partial.exists():
                os.rename(folder, partial)
            if aside.exists():
                os.rename(aside, folder)
            raise
        sync_folder(self._run)
        write_atomically(self._run / POINTER, f"{iteration}\n")
        course = Lineage.of(writing.state.get("lineage"))
        kept = self._most_recent_k, self._retain_interval
        for old in outdated_on_course(self._run, course, iteration, *kept):
            os.rename(
                iteration_folder(self._run, old),
                f"{iteration_folder(self._run, old)}.partial-removed",
            )
        self._sweeper = threading.Thread(
            target=_sweep, args=(self._run,)
        )  # large files take a while to go
        self._sweeper.start()

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _wait_for_sweeper(self) -> None:
        if self._sweeper is not None:
            self._sweeper.join()
            self._sweeper = None


def _cannot_write(iteration: int, error: OSError | CheckpointError) -> SaveError:
    what = f"the checkpoint of iteration {iteration}"
    if isinstance(error, OSError):
        return SaveError(f"{what} cannot be written (is the disk full?): {error}")
    return SaveError(
        f"{what} is not published: {error}; find out what else writes to the run directory"
    )


def _sweep(run: Path) -> None:
    """Remove what killed saves have left, and what was put aside."""
    for path in run.glob("iter_*.partial*"):
        if re.match(r"iter_[0-9]{7,}\.partial", path.name):
            shutil.rmtree(path, ignore_errors=True)
