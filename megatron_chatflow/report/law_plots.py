"""The plot of a fitted law: residuals, losses over size and length, and the compute frontier.

matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.report.plots import write_png

_COLORS = {"scratch": "tab:blue", "continued": "tab:orange"}


def plot_law(
    path: str | Path, points: Sequence[Mapping[str, Any]], curves: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draw a law and the runs that it was fitted to, to a PNG: a row per kind of runs.

    Args:
        path: the file to write.
        points: runs with ``params``, ``tokens``, ``kind``, ``measured`` and ``predicted`` losses.
        curves: {kind: what `planner.laws.plans.curves` returns}.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), 3, squeeze=False)
    for (kind, curve), (residuals, surface, frontier) in zip(curves.items(), axes, strict=True):
        runs = [point for point in points if point["kind"] == kind]
        columns = {
            name: np.array([run[name] for run in runs], dtype=float)
            for name in ("params", "tokens", "measured", "predicted")
        }
        _residuals(residuals, columns)
        _surface(surface, columns, curve)
        _frontier(frontier, columns, curve, _COLORS.get(kind, "tab:green"))
        residuals.set_title(kind)
    write_png(FigureCanvasAgg(figure), path)


def _residuals(axes: Any, runs: Mapping[str, np.ndarray]) -> None:
    errors = 100 * np.log(runs["predicted"] / runs["measured"])
    drawn = axes.scatter(runs["measured"], errors, c=np.log10(runs["params"]), cmap="viridis")
    axes.figure.colorbar(drawn, ax=axes, label="log10 N")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="measured loss", ylabel="predicted over measured loss, %")


def _surface(axes: Any, runs: Mapping[str, np.ndarray], curve: Mapping[str, Any]) -> None:
    lines = axes.contour(
        curve["params"], curve["tokens"], curve["losses"], levels=12, cmap="viridis"
    )
    axes.clabel(lines, fontsize=7)
    axes.scatter(runs["params"], runs["tokens"], s=14, color="black", label="runs")
    inside = (curve["best_params"] <= curve["params"][-1]) & (
        curve["best_tokens"] <= curve["tokens"][-1]
    )
    axes.plot(
        curve["best_params"][inside],
        curve["best_tokens"][inside],
        color="tab:red",
        label="best split of compute",
    )
    axes.set(xscale="log", yscale="log", xlabel="N (parameters)", ylabel="D (tokens)")
    axes.legend(fontsize=8, loc="upper left")


def _frontier(
    axes: Any, runs: Mapping[str, np.ndarray], curve: Mapping[str, Any], color: str
) -> None:
    axes.scatter(
        6 * runs["params"] * runs["tokens"], runs["measured"], s=14, color="black", label="runs"
    )
    axes.plot(curve["flops"], curve["best_losses"], color=color, label="best split of compute")
    axes.set(xscale="log", yscale="log", xlabel="C = 6 N D (FLOPs)", ylabel="loss")
    axes.legend(fontsize=8, loc="upper right")
