"""The run directory against its model, for a few minutes; tests/run_states.py as a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run_states import explore


@pytest.mark.slow
def test_whatever_happens_to_a_run_directory_the_model_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = explore(tmp_path, minutes=2, number=7)
    assert result["examples"] > 2 and result["steps"]["trained"] > 5
