"""tests/chaos.py as a test: a run that is killed and stopped at random moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import run_chaos


@pytest.mark.slow
def test_a_run_hit_by_faults_has_the_bits_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = run_chaos(tmp_path, faults=15, seed=3)
    assert sum(result["faults"].values()) == 15 and result["longest_down"] < 60
