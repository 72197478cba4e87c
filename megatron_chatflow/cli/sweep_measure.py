"""How long a sweep would take: some steps of each size are trained and timed."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow.cli.sweep_processes import RunProcesses, devices_of_slots, threads_of_run
from megatron_chatflow.cli.sweep_state import LOG, SETTINGS
from megatron_chatflow.config import to_yaml
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.sweep_file import Sweep
from megatron_chatflow.planner.sweep_plan import PlannedRun
from megatron_chatflow.utils.user_files import dump_yaml

_STEPS = 4
_POLL_SECONDS = 0.1


def estimate(sweep: Sweep, runs: Sequence[PlannedRun], jobs: int) -> str:
    """Return how many hours `runs` would take, `jobs` at a time.

    The steps are timed one run at a time, with the threads that each of `jobs` runs gets: runs
    that share a memory bus are slower. Starts of processes are counted, validations are not.

    Raises:
        ConfigError: a size cannot be trained.
    """
    variables = {"OMP_NUM_THREADS": str(threads_of_run(jobs, os.environ))}
    variables |= devices_of_slots(jobs, sweep.processes, os.environ)[0]
    seconds, lines = 0.0, []
    for size in dict.fromkeys(run.size for run in runs):
        those = [run for run in runs if run.size == size]
        start, step = _measure(sweep, those[0], variables)
        spent = sum(start + (run.iterations - run.first) * step for run in those)
        seconds += spent
        lines.append(
            f"{size}: {step:.3g} s per step, {start:.0f} s to start a run, {spent / 3600:.2f} h"
        )
    total = f"about {seconds / 3600 / jobs:.2f} hours with --jobs {jobs}"
    return "\n".join([*lines, f"{total}, measured with {_STEPS} steps of each size"])


def _measure(sweep: Sweep, run: PlannedRun, variables: dict[str, str]) -> tuple[float, float]:
    """Return (seconds to start a run, seconds per step)."""
    with tempfile.TemporaryDirectory(prefix="chatflow-sweep-") as name:
        folder = Path(name)
        curriculum = folder / "curriculum.yaml"
        curriculum.write_text(dump_yaml(sweep.curricula[run.share]), encoding="utf-8")
        changes: dict[str, Any] = {"save": name, "load": None, "finetune": False}
        changes |= {"branch_from": None, "train_iters": _STEPS, "eval_interval": None}
        changes |= {"lr_decay_style": "constant", "lr_wsd_decay_iters": None}
        changes |= {"lr_warmup_iters": 0, "lr_warmup_samples": 0, "curriculum": str(curriculum)}
        (folder / SETTINGS).write_text(to_yaml(run.written.replace(**changes)), encoding="utf-8")
        words = ["train", "--config", str(folder / SETTINGS)]
        processes = RunProcesses(words, folder / LOG, sweep.processes, variables)
        try:
            while (code := processes.poll()) is None:
                time.sleep(_POLL_SECONDS)
        finally:
            processes.kill()
        if code:
            raise ConfigError(
                f"{sweep.source}: {run.size} cannot be trained: {processes.reason()}; correct its "
                "settings"
            )
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line)["time"]["iteration-time"] for line in lines]
        step = statistics.median(steps[1:])
        return max(0.0, processes.seconds - sum(steps)), step
