"""The plot of a plan is a picture, and draws what it is given."""

import subprocess
import sys

import numpy as np
import pytest

from megatron_chatflow.report.plots import plot_plan, plot_run


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_plan_is_drawn_to_a_png_without_a_display(tmp_path, size):
    from matplotlib.image import imread

    samples, shares = np.arange(100), np.full((100, size), 1 / size)
    names = [f"domain{i}" for i in range(size)]
    plot_plan(
        tmp_path / "plan.png",
        samples=samples,
        shares=shares,
        names=names,
        stages=[("a", 0), ("b", 50)],
        tokens=dict.fromkeys(names, 10),
    )
    picture = imread(tmp_path / "plan.png")
    assert picture.shape[0] >= 400 and picture.shape[1] >= 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > size


def record(iteration, names):
    rows = {
        name: {
            "samples": 8 // len(names),
            "share_target": 1 / len(names),
            "tokens": 100,
            "loss": 5.0 / iteration,
        }
        for name in names
    }
    return {"iteration": iteration, "batch-size": 8, "domains": rows}


@pytest.mark.parametrize("iterations", [1, 3, 1000])
def test_a_run_is_drawn_from_its_records(tmp_path, iterations):
    """Also one that was skipped, a domain that joins late, and a validation."""
    from matplotlib.image import imread

    records = [record(i, ["en"] if i < 50 else ["en", "zh"]) for i in range(1, iterations + 1)]
    records[0]["domains"]["en"] |= {"loss": None}
    records.append({"iteration": iterations, "validation": {"en": {"loss": 4.0}}})
    plot_run(tmp_path / "run.png", records)
    picture = imread(tmp_path / "run.png")
    assert (
        picture.shape[0] >= 400
        and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 3
    )


def test_the_tool_draws_a_run_and_says_where_there_is_none(tmp_path, reference):
    call = [sys.executable, "tools/plot_run.py"]
    done = subprocess.run(
        [*call, reference, "--output", tmp_path / "a.png"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "a.png: 23 records drawn" in done.stdout, done
    missing = subprocess.run([*call, tmp_path], capture_output=True, text=True, timeout=60)
    assert (
        missing.returncode == 2
        and "metrics.jsonl: No such file" in missing.stderr
        and not (tmp_path / "run.png").exists()
    )
    (tmp_path / "metrics.jsonl").write_text("")
    empty = subprocess.run([*call, tmp_path], capture_output=True, text=True, timeout=60)
    assert empty.returncode == 2 and "no record is of an iteration" in empty.stderr


def test_matplotlib_is_not_imported_before_something_is_drawn():
    code = "import sys, megatron_chatflow.report.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
