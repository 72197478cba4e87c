"""Plots to PNG files. matplotlib is imported when one is drawn, without a display and without touching its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def plot_plan(
    path: str | Path,
    *,
    samples: np.ndarray,
    shares: np.ndarray,
    names: Sequence[str],
    stages: Sequence[tuple[str, int]],
    tokens: Mapping[str, int],
) -> None:
    """Draws the scheduled shares over the run, and the tokens of each domain, to a PNG.

    Args:
        path: the file to write.
        samples: sample numbers, increasing: [n].
        shares: scheduled share of each domain at these samples: [n, K].
        names: the domains: K.
        stages: (name, first sample).
        tokens: of each domain over the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, max(4.5, 0.22 * len(names))), layout="constrained")
    over_run, bars = figure.subplots(1, 2, width_ratios=(3, 1))
    colours = _colours(len(names))
    over_run.stackplot(samples, shares.T, colors=colours, labels=names)
    for name, first in stages:
        over_run.axvline(first, color="black", linewidth=0.8, linestyle=":")
        over_run.annotate(name, (first, 1.0), xytext=(3, 3), textcoords="offset points", fontsize=8)
    over_run.set(xlim=(samples[0], max(samples[-1], 1)), ylim=(0, 1), xlabel="sample", ylabel="scheduled share")
    bars.barh(range(len(names)), [tokens[name] for name in names], color=colours)
    bars.set_yticks(range(len(names)), names)
    bars.set(xlabel="tokens", title="drawn over the run")
    bars.title.set_fontsize(9)
    FigureCanvasAgg(figure).print_png(str(path))


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    if count <= 20:
        return [colormaps["tab10" if count <= 10 else "tab20"](i) for i in range(count)]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]
