"""The plot of a plan is a picture, and draws what it is given."""

import subprocess
import sys

import numpy as np
import pytest

from megatron_chatflow.report.plots import plot_plan


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_plan_is_drawn_to_a_png_without_a_display(tmp_path, size):
    from matplotlib.image import imread

    samples, shares = np.arange(100), np.full((100, size), 1 / size)
    names = [f"domain{i}" for i in range(size)]
    plot_plan(tmp_path / "plan.png", samples=samples, shares=shares, names=names, stages=[("a", 0), ("b", 50)], tokens=dict.fromkeys(names, 10))
    picture = imread(tmp_path / "plan.png")
    assert picture.shape[0] >= 400 and picture.shape[1] >= 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > size


def test_matplotlib_is_not_imported_before_something_is_drawn():
    code = "import sys, megatron_chatflow.report.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
