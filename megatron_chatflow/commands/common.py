"""What several commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_chatflow.config import UsageError, load_values
from megatron_chatflow.config.settings import ParallelSettings


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Inside, a ValueError or a missing file is the user's matter: it becomes a UsageError. Wraps only what checks the user's words."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def run_values(run: str | Path, *, keep_layout: bool = True) -> dict[str, Any]:
    """{setting: value} of a run directory's config.yaml, as the base that flags win over.

    Args:
        run: the run directory (what was --save).
        keep_layout: False leaves out how the run was laid over processes: its checkpoint loads into any layout.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{run} is not a run directory: it has no config.yaml; give the folder that was --save of a run")
    values = load_values(path)
    if not keep_layout:
        for name in ParallelSettings.__dataclass_fields__:
            values.pop(name, None)
    return values
