"""The study in miniature, examples/scaling_law: its sweeps, and its short form from end to end."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chatflow.planner.laws.run_table import read_table
from megatron_chatflow.planner.sweep_file import load_sweep
from megatron_chatflow.planner.sweep_plan import plan_runs
from tests.test_quickstart import ROOT, SHIPPED

EXAMPLE = ROOT / "examples" / "scaling_law"


def sweeps() -> Any:
    """The example's module."""
    spec = importlib.util.spec_from_file_location("sweeps", EXAMPLE / "sweeps.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["full", "short"])
def test_the_study_has_the_runs_of_its_readme(tmp_path: Path, kind: str) -> None:
    counts = {}
    for name, content in sweeps().files(tmp_path, kind).items():
        (tmp_path / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    for path in sorted(tmp_path.glob("*.yaml")):
        if path.stem != "curriculum":
            runs = [run for group in plan_runs(load_sweep(path)) for run in group]
            counts[path.stem] = sum(not run.is_leg for run in runs)
            sizes = {run.size: run.params(4096) for run in runs}
            assert path.stem == "mixtures" or list(sizes.values()) == [
                307_632, 947_232, 2_333_808, 4_771_392
            ]  # fmt: skip
            starts = {Path(run.start).name for run in runs if run.start is not None}
            assert starts <= {run.name for run in english(tmp_path)}
    full = kind == "full"
    assert counts == {
        "english": 4,
        "scratch": 12,
        "continued": 24 if full else 12,
        "mixtures": 2 if full else 3,
    }


def english(folder: Path) -> list[Any]:
    return [run for group in plan_runs(load_sweep(folder / "english.yaml")) for run in group]


@pytest.mark.slow
def test_the_short_study_runs_fits_and_reports(tmp_path: Path) -> None:
    copy = tmp_path / "a copy"
    copy.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("out", "__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    environment = os.environ | (
        {"VIRTUAL_ENV": sys.prefix} if sys.prefix != sys.base_prefix else {}
    )
    script = copy / "examples" / "scaling_law" / "run.sh"
    done = subprocess.run(
        ["bash", script, "--short"],
        cwd="/", env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = script.parent / "out" / "short"
    for kind, count in {"english": 4, "scratch": 12, "continued": 12, "mixtures": 3}.items():
        records = read_table(out / "runs" / kind / "runs.csv")
        assert len({record.name for record in records}) == count
        assert all(record.annealed for record in records)
        wanted = "scratch" if kind in ("english", "scratch") else "continued"
        assert {record.kind for record in records} == {wanted}
    law = json.loads((out / "law-replay30.json").read_text())
    assert [found["language"] for found in law["laws"]] == ["zh"]
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page and "proposed shares" in page
