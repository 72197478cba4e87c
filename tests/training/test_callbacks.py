"""Callbacks take part in a run: the order of hooks, and the example of the documentation."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

DOCS = Path(__file__).parents[2] / "docs" / "callbacks.md"


def run_example(folder: Path) -> tuple[bool, list[str], str | None]:
    """Run the program of the documentation in `folder`, as a rank."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    with contextlib.chdir(folder):
        exec(compile(code, str(DOCS), "exec"), names)
    return names["complete"], names["stop"].saved, names["trainer"].state.exit_reason


def test_the_example_of_the_documentation_ends_the_run_early(pool: Pool, sample: Path) -> None:
    results = pool.run(2, run_example, sample)
    assert [complete for complete, _, _ in results] == [False, False]
    assert [reason for _, _, reason in results] == ["zh below 20.0"] * 2
    assert [saved for _, saved, _ in results] == [[], []]  # it ended before the first iteration


def train_with_recorder(folder: Path, run: Path) -> tuple[bool, list[str]]:
    """Train two iterations with a callback that writes down the hooks as they are called."""
    from megatron_chatflow import Config, Trainer
    from megatron_chatflow.config import load_values
    from megatron_chatflow.training.callbacks import Callback

    called: list[str] = []

    class Recorder(Callback):
        def on_fit_start(self, state: Any) -> None:
            called.append("fit start")

        def before_update(self, state: Any) -> None:
            called.append("update")

        def on_step_end(self, state: Any, result: Any) -> None:
            called.append(f"step {state.iteration}: {result.start} to {result.stop}")

        def on_iteration_end(self, state: Any) -> None:
            called.append("iteration end")

        def on_validation_end(self, state: Any, losses: Any) -> None:
            assert losses.by_name["zh"]["loss"] > 0 and losses.overall["loss"] > 0
            called.append("validation")

        def on_checkpoint_start(self, state: Any, record: dict[str, Any]) -> None:
            record["note"] = "from a callback"
            called.append("checkpoint start")

        def on_checkpoint_saved(self, state: Any, saved: Any) -> None:
            called.append(saved.folder.name)

        def on_fit_end(self, state: Any) -> None:
            called.append("fit end")

        def close(self) -> None:
            called.append("close")

    config = Config().replace(**load_values(folder / "run.yaml"))
    config = config.replace(
        train_iters=2, lr_warmup_iters=0, save=str(run), save_interval=2, eval_interval=2
    )
    complete = Trainer.from_config(config, callbacks=[Recorder()]).run()
    return complete, called


def test_hooks_are_called_in_order(pool: Pool, sample: Path, tmp_path: Path) -> None:
    ((complete, called),) = pool.run(1, train_with_recorder, sample, tmp_path / "run")
    assert complete and called == [
        "fit start",
        "validation",
        "update",
        "step 1: 0 to 8",
        "iteration end",
        "update",
        "step 2: 8 to 16",
        "validation",
        "checkpoint start",
        "iter_0000002",
        "iteration end",
        "fit end",
        "close",
    ]
    state = json.loads((tmp_path / "run" / "iter_0000002" / "state.json").read_text())
    assert state["note"] == "from a callback"


def fail_in_hook(folder: Path, run: Path) -> str:
    """Train with a callback whose hook fails."""
    from megatron_chatflow import Config, Trainer
    from megatron_chatflow.config import load_values
    from megatron_chatflow.training.callbacks import Callback

    class Failing(Callback):
        def on_step_end(self, state: Any, result: Any) -> None:
            raise RuntimeError("a bug in the hook")

    config = Config().replace(**load_values(folder / "run.yaml")).replace(save=str(run))
    with pytest.raises(RuntimeError, match="a bug in the hook"):
        Trainer.from_config(config, callbacks=[Failing()]).run()
    return ", ".join(sorted(name for name in os.listdir(run) if name.startswith("lease")))


def test_an_error_in_a_hook_ends_the_run_and_releases_the_run_directory(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    assert pool.run(1, fail_in_hook, sample, tmp_path / "run") == [""]
