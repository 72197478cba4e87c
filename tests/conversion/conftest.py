"""Small models, made once, and the real one of examples/smollm2_zh, with its text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversion.models import build, tool
from tests.pool import Pool

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smollm2_zh"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the Hugging Face folder of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(
                tmp_path_factory.mktemp("hf") / family,
                family,
                shard="100KB" if family == "llama3" else "5GB",
            )
        return made[family]

    return folder


@pytest.fixture(scope="session")
def runs(pool: Pool, folders: Callable[[str], Path]) -> Callable[[str], Path]:
    """Gives the run directory that the folder of a family became."""

    def run(family: str) -> Path:
        target = folders(family).parent / f"{family}-run"
        if not target.exists():
            ((code, _, err),) = pool.run(
                1, tool, "--load-dir", folders(family), "--save-dir", target
            )
            assert code == 0, err
        return target

    return run


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: the example's, where it has been fetched
    already.
    """
    return _fetched(["fetch_model.py"], "smollm2", ["NOTICE"], tmp_path_factory)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with en.jsonl, zh.jsonl and hu.jsonl: the example's, where they have been made
    already.
    """
    return _fetched(
        ["fetch_corpora.py", "--hungarian"],
        "corpora",
        ["sources.json", "hu.jsonl"],
        tmp_path_factory,
    )


def _fetched(
    script: list[str], name: str, files: list[str], folders: pytest.TempPathFactory
) -> Path:
    """What a script of the example fetches; `files` are there when it has been."""
    there = EXAMPLE / "out" / name
    if all((there / file).is_file() for file in files):
        return there
    folder = folders.mktemp("fetched") / name
    call = [sys.executable, EXAMPLE / script[0], folder, *script[1:]]
    done = subprocess.run(call, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        pytest.skip(
            f"{script[0]} cannot fetch: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
        )
    return folder
