"""The benchmark of the data plane, in its short form: that it runs, says what it promises, and
leaves nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "data_plane.py"
PROMISED = (
    "open_seconds",
    "open_mb",
    "open_seconds_1e6",
    "open_ratio",
    "memory_ratio",
    "read_ratio_2048",
    "read_ratio_4096",
    "loader_ratio_2048",
    "locate_ms_4",
    "locate_ms_100",
)


@pytest.mark.slow
def test_it_prints_one_json_object_last_and_cleans_up(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(BENCHMARK), "--short"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert set(PROMISED) <= set(figures) and all(value > 0 for value in figures.values())
    assert not [name for name in os.listdir(tmp_path) if name.startswith("data_plane_")]
    assert min(figures[name] for name in PROMISED if "ratio" in name) > 1
