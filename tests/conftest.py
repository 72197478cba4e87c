"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import Pool
from tests.sample import build, train


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The session's gloo ranks."""
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sample corpora preprocessed, curriculum.yaml and run.yaml."""
    return build(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="session")
def reference(pool: Pool, sample: Path) -> Path:
    """The run directory of 20 iterations on one process, validated every 10, saved every 10."""
    run = sample / "reference"
    (done,) = pool.run(
        1, train, sample, "--save", str(run), "--save-interval", "10", "--eval-interval", "10"
    )
    assert done[0] == 0, done
    return run


@pytest.fixture(scope="session")
def averaged(pool: Pool, sample: Path) -> Path:
    """The run directory of 6 iterations in bf16 with a running mean of the weights, saved every
    2.
    """
    run = sample / "averaged"
    words = [
        "--train-iters",
        "6",
        "--lr-warmup-iters",
        "0",
        "--bf16",
        "--ema-decay",
        "0.7",
        "--save-interval",
        "2",
    ]
    (done,) = pool.run(1, train, sample, "--save", str(run), *words)
    assert done[0] == 0, done
    return run
