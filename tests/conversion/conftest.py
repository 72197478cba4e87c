"""Small models, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversion.models import build, tool
from tests.pool import Pool


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the Hugging Face folder of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(tmp_path_factory.mktemp("hf") / family, family, shard="100KB" if family == "llama3" else "5GB")
        return made[family]

    return folder


@pytest.fixture(scope="session")
def runs(pool: Pool, folders: Callable[[str], Path]) -> Callable[[str], Path]:
    """Gives the run directory that the folder of a family became."""

    def run(family: str) -> Path:
        target = folders(family).parent / f"{family}-run"
        if not target.exists():
            ((code, _, err),) = pool.run(1, tool, "--load-dir", folders(family), "--save-dir", target)
            assert code == 0, err
        return target

    return run
