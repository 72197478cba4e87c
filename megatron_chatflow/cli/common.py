"""What several commands share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_chatflow.config import load_values
from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.errors import ChatflowError, ConfigError, ConfigErrors, messages_of


@contextlib.contextmanager
def prefixed_errors(of: str) -> Iterator[None]:
    """Put `of` before each message of a ChatflowError that is raised inside."""
    try:
        yield
    except ChatflowError as error:
        raise ConfigErrors(f"{of}{message}" for message in messages_of(error)) from None


def install_engine() -> None:
    """Make megatron-core usable on this machine; before the first import that needs it."""
    from megatron_chatflow.distributed import cuda_shim, process_groups

    process_groups.hide_engine_warnings()
    cuda_shim.install()


def run_values(run: str | Path, *, keep_layout: bool = True) -> dict[str, Any]:
    """{setting: value} of a run directory's config.yaml, as the base that flags win over.

    Args:
        run: the run directory (what was --save).
        keep_layout: False leaves out how the run was laid over processes: its checkpoint loads into
        any layout.
    """
    path = Path(run) / "config.yaml"
    if not os.path.isfile(path):
        raise ConfigError(
            f"{run} is not a run directory: it has no config.yaml; give the folder that was "
            f"--save of a run"
        )
    values = load_values(path)
    if not keep_layout:
        for name in ParallelSettings.__dataclass_fields__:
            values.pop(name, None)
    return values
