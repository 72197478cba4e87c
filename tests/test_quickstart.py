"""The quickstart as a newcomer runs it, in a copy of the repository, from another folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "LICENSE",
    "README.md",
    "examples",
    "megatron_chatflow",
    "pyproject.toml",
    "requirements.txt",
    "requirements-dev.txt",
    "setup.py",
    "tools",
)


def run(script: Path) -> str:
    environment = os.environ | (
        {"VIRTUAL_ENV": sys.prefix} if sys.prefix != sys.base_prefix else {}
    )
    done = subprocess.run(
        ["bash", script], cwd="/", env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_runs_twice_and_every_held_out_loss_falls_by_a_nat(tmp_path: Path):
    copy = tmp_path / "a copy"
    copy.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("out", "__pycache__")
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    for _ in range(2):
        printed = run(copy / "examples" / "quickstart" / "run.sh")
    results = dict(
        re.findall(
            r"^(checkpoint|TensorBoard|metrics|plot): +(.+?)(?: {3}| \(|$)", printed, re.MULTILINE
        )
    )
    assert sorted(results) == ["TensorBoard", "checkpoint", "metrics", "plot"]
    assert all(Path(path).exists() for path in results.values())
    assert Path(results["plot"]).read_bytes().startswith(b"\x89PNG")
    assert list(Path(results["TensorBoard"]).glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in Path(results["metrics"]).read_text().splitlines()]
    assert sum("lm loss" in line for line in lines) >= 100
    held_out = [line["validation"] for line in lines if "validation" in line]
    assert sorted(held_out[0]) == ["en", "en-zh", "instruct", "zh"]
    for name, before in held_out[0].items():
        assert held_out[-1][name]["loss"] < before["loss"] - 1.0, name
