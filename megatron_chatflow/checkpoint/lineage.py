"""Which checkpoints of a run directory are on one course of training. Imports no torch.

A run that is sent back (--ckpt-step, or a damaged checkpoint) trains from there on under a new
branch. Every checkpoint records its lineage: its branch, and where the branches before it were
left. What a course does not contain is never loaded in its place, averaged with it or counted.

RUN/lineage.json    the course that the run is on, written before anything of it is
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint import integrity
from megatron_chatflow.errors import ChatflowError, CheckpointError
from megatron_chatflow.utils.files import write_atomically
from megatron_chatflow.utils.user_files import load_json

FILE = "lineage.json"
_DAMAGE = (ChatflowError, OSError)


@dataclass(frozen=True)
class Origin:
    """The checkpoint of another run directory that a run began with."""

    run: str
    """The directory, without links."""
    branch: str
    """Of the checkpoint."""
    iteration: int

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Origin:
        """The origin of a run that loads `folder`, an iteration's folder of a run directory."""
        iteration = int(folder.name.removeprefix("iter_"))
        return cls(
            str(folder.parent.resolve()), (read_lineage(folder) or UNKNOWN).branch, iteration
        )


@dataclass(frozen=True)
class Lineage:
    """A branch, and those that it grew from."""

    branch: str
    ancestors: tuple[tuple[str, int], ...] = ()
    """(branch, the last iteration that is on the course), oldest first."""
    parent: Origin | None = None
    """What the run continues, where that is another directory's: its trunk (--branch-from)."""
    weights: Origin | None = None
    """Where the run took its first weights from (--finetune); its branches keep it."""

    @classmethod
    def new(cls, weights: Path | None = None) -> Lineage:
        """The lineage of a run that starts, from the weights of a checkpoint where it is given."""
        origin = None if weights is None else Origin.of_checkpoint(weights)
        return cls(uuid.uuid4().hex[:12], weights=origin)

    @classmethod
    def of(cls, value: Any) -> Lineage:
        """Read what `plain` gave; None is that of checkpoints of earlier versions.

        Raises:
            CheckpointError: it is something else.
        """
        if value is None:
            return UNKNOWN
        parts = value if isinstance(value, dict) else {}
        branch, ancestors = parts.get("branch"), parts.get("ancestors")
        if type(branch) is not str or not isinstance(ancestors, list):
            raise CheckpointError("it is not a lineage")
        for pair in ancestors:
            if not isinstance(pair, list) or [type(part) for part in pair] != [str, int]:
                raise CheckpointError("it is not a lineage")
        left = tuple((name, iteration) for name, iteration in ancestors)
        return cls(branch, left, _origin(parts.get("parent")), _origin(parts.get("weights")))

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        origins = {"parent": self.parent, "weights": self.weights}
        return {
            "branch": self.branch,
            "ancestors": [list(pair) for pair in self.ancestors],
            **{name: asdict(origin) for name, origin in origins.items() if origin is not None},
        }

    def leave(self, iteration: int, parent: Origin | None = None) -> Lineage:
        """A new branch that grows from `iteration` of this one.

        `parent` is given where the branch has another run directory.
        """
        ancestors = (*self.ancestors, (self.branch, iteration))
        return Lineage(uuid.uuid4().hex[:12], ancestors, parent or self.parent, self.weights)

    def contains(self, other: Lineage | None, iteration: int) -> bool:
        """Whether the checkpoint of `iteration` with the lineage `other` is on this course."""
        return other is not None and self.has(other.branch, iteration)

    def has(self, branch: str, iteration: int) -> bool:
        """Whether what `branch` did at `iteration` is on this course."""
        return branch == self.branch or iteration <= dict(self.ancestors).get(branch, -1)


def _origin(value: Any) -> Origin | None:
    if value is None:
        return None
    parts = value if isinstance(value, dict) else {}
    found = [parts.get(name) for name in ("run", "branch", "iteration")]
    if [type(part) for part in found] != [str, str, int]:
        raise CheckpointError("it is not a lineage")
    return Origin(parts["run"], parts["branch"], parts["iteration"])


UNKNOWN = Lineage("unknown")
"""That of checkpoints which record none: one course."""


def read_lineage(folder: Path) -> Lineage | None:
    """The lineage of a checkpoint; None where its state.json is damaged."""
    try:
        content = (folder / "state.json").read_bytes()
        records = integrity.read_manifest(folder)
        digest = hashlib.sha256(content).hexdigest()
        if records is not None and records.get("state.json", {}).get("sha256") != digest:
            return None
        state = load_json(content)
        return Lineage.of(state.get("lineage")) if isinstance(state, dict) else None
    except _DAMAGE:
        return None


def read_course(run: Path) -> Lineage | None:
    """The lineage in `RUN/lineage.json`; None where it is missing or damaged."""
    try:
        return Lineage.of(load_json((run / FILE).read_bytes()))
    except _DAMAGE:
        return None


def write_course(run: Path, lineage: Lineage) -> None:
    """Record the course that a run is on."""
    write_atomically(run / FILE, json.dumps(lineage.plain()) + "\n")


def listed(iterations: Iterable[int]) -> str:
    """Iterations in a message: the first ten."""
    numbers = sorted(iterations)
    more = f", ... ({len(numbers)} in all)" if len(numbers) > 10 else ""
    return f"iteration{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:10]))}{more}"
