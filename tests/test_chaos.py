"""A run that is killed, stopped and robbed of its disk at random moments; tests/chaos.py as a
test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import torment


@pytest.mark.slow
def test_a_tormented_run_ends_with_the_bits_of_one_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = torment(tmp_path, faults=15, seed=3)
    assert sum(result["faults"].values()) == 15 and result["longest_down"] < 60
