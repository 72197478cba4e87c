"""What the examples of tests/run_states.py share: corpora, processes, the bits of each history."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

BATCH, LONGEST = 16, 20
VERSIONS = (
    [{"name": "a", "at": 0, "weights": {"en": 0.7, "zh": 0.3}}],
    [{"name": "b", "at": 0, "weights": {"en": 0.2, "zh": 0.8}}],
)
"""Curricula that the run may have; each in force from an iteration on."""
MODEL = {
    "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32,
    "position_embedding_type": "rope", "normalization": "RMSNorm", "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}  # fmt: skip

Amendments = tuple[tuple[int, int], ...]
"""((iteration after which it is in force, number in VERSIONS), ...)."""
History = tuple[tuple[Amendments, bool], ...]
"""For each iteration the amendments known to it, and whether it was skipped."""


def command(log: Path, words: list[str], kill: tuple[Any, ...] | None) -> None:
    """Run `chatflow WORDS` in this process, with its output in `log`.

    With `kill` the process is killed at a file operation.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
    from megatron_chatflow.__main__ import main
    from tests.kill_points import kill_at

    try:
        if kill:
            kill_at(*kill)
        code = main(words)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


@dataclasses.dataclass
class Saved:
    """A checkpoint folder as the model knows it."""

    history: History
    stamp: int
    """When its state.json was written: shows whether the folder was replaced."""
    branch: int
    """The branch that it was made on; see `RunDirectory.course`."""
    damaged: bool = False


class World:
    """What all examples share."""

    def __init__(self, folder: Path) -> None:
        import yaml

        from tests.audit import TINY
        from tests.chaos_ranks import preload
        from tests.sample import DOMAINS, build

        self.folder, self.context = folder, preload()
        (folder / "corpora").mkdir()
        build(folder / "corpora")
        training = {
            "micro_batch_size": BATCH,
            "global_batch_size": BATCH,
            "train_samples": LONGEST * BATCH,
        }
        run = TINY | {
            "model": MODEL,
            "training": training,
            "logging": {"log_interval": 1},
            "validation": {"eval_iters": 0},
        }
        run["data"] = run["data"] | {"seq_length": 16}
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        for number, stages in enumerate(VERSIONS):
            domains = {
                name: {"path": str(folder / "corpora" / DOMAINS[name][0])} for name in ("en", "zh")
            }
            (folder / f"curriculum{number}.yaml").write_text(
                yaml.safe_dump({"domains": domains, "stages": stages})
            )
        self.bits: dict[History, str] = {}
        self.losses: dict[History, float | None] = {}
        self.counts: Counter[str] = Counter()
        self.instants: Counter[str] = Counter()


def digest_of(folder: Path) -> str:
    """Return a hash of the weights, the optimizer state and the position in the run."""
    from megatron_chatflow.checkpoint.tensor_reader import read_tensors

    digest = hashlib.sha256()
    for name, tensor in read_tensors(folder):
        digest.update(name.encode())
        digest.update(
            tensor.contiguous().reshape(-1).view(dtype=__import__("torch").uint8).numpy().tobytes()
        )
    state = json.loads((folder / "state.json").read_text())
    digest.update(json.dumps([state["iteration"], state["consumed_train_samples"]]).encode())
    return digest.hexdigest()
