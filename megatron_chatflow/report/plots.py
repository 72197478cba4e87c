"""Plots to PNG files.

matplotlib is imported when a plot is drawn, without a display and without changing its global
state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.errors import ConfigError, DataError


def plot_plan(
    path: str | Path,
    *,
    samples: np.ndarray,
    shares: np.ndarray,
    names: Sequence[str],
    stages: Sequence[tuple[str, int]],
    tokens: Mapping[str, int],
) -> None:
    """Draw the scheduled shares over the run, and the tokens of each domain, to a PNG.

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
    colors = _colors(len(names))
    over_run.stackplot(samples, shares.T, colors=colors, labels=names)
    for name, first in stages:
        over_run.axvline(first, color="black", linewidth=0.8, linestyle=":")
        over_run.annotate(name, (first, 1.0), xytext=(3, 3), textcoords="offset points", fontsize=8)
    over_run.set(
        xlim=(samples[0], max(samples[-1], 1)),
        ylim=(0, 1),
        xlabel="sample",
        ylabel="scheduled share",
    )
    bars.barh(range(len(names)), [tokens[name] for name in names], color=colors)
    bars.set_yticks(range(len(names)), names)
    bars.set(xlabel="tokens", title="drawn over the run")
    bars.title.set_fontsize(9)
    write_png(FigureCanvasAgg(figure), path)


def plot_run(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw each domain's shares and losses in a run to a PNG.

    Shares are realized and scheduled, losses in training and held out. A point covers a stretch of
    iterations with 20 samples or more, and there are 200 points at most: shares of the stretch's
    samples, losses as means over its tokens.

    Args:
        path: the file to write.
        records: those of metrics.jsonl; at least one is of an iteration.

    Raises:
        DataError: no record is of an iteration, or one lacks the values that are drawn.
    """
    _check(records)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [record for record in records if "domains" in record]
    if not trained:
        raise DataError("no record is of an iteration")
    names = sorted({name for record in trained for name in record["domains"]})
    count = min(200, len(trained), max(1, sum(record["batch-size"] for record in trained) // 20))
    stretches = np.array_split(np.arange(len(trained)), count)
    at = [trained[stretch[-1]]["iteration"] for stretch in stretches]
    figure = Figure(figsize=(12, max(4.8, 0.22 * len(names))), layout="constrained")
    shares, losses = figure.subplots(1, 2)
    for name, colour in zip(names, _colors(len(names)), strict=True):
        rows = [
            [trained[i]["domains"].get(name, _NOTHING) for i in stretch] for stretch in stretches
        ]
        sizes = [[trained[i]["batch-size"] for i in stretch] for stretch in stretches]
        shares.plot(
            at,
            [
                sum(row["samples"] for row in part) / sum(size)
                for part, size in zip(rows, sizes, strict=True)
            ],
            color=colour,
            label=name,
        )
        scheduled = [
            np.average([row["share_target"] for row in part], weights=size)
            for part, size in zip(rows, sizes, strict=True)
        ]
        shares.plot(at, scheduled, color=colour, linestyle=":")
        learnt = [
            (i, loss) for i, loss in zip(at, map(_mean_loss, rows), strict=True) if loss is not None
        ]
        losses.plot([i for i, _ in learnt], [loss for _, loss in learnt], color=colour)
        held_out = [
            (r["iteration"], r["validation"][name]["loss"])
            for r in records
            if name in r.get("validation", {})
        ]
        losses.plot(
            [i for i, _ in held_out],
            [loss for _, loss in held_out],
            color=colour,
            marker="o",
            markersize=4,
            linestyle="--",
        )
    shares.set(xlabel="iteration", ylabel="share (dotted: scheduled)", ylim=(0, None))
    losses.set(xlabel="iteration", ylabel="loss (points: held out)")
    shares.legend(fontsize=8)
    write_png(FigureCanvasAgg(figure), path)


def write_png(canvas: Any, path: str | Path) -> None:
    """Write a figure; raises ConfigError where the path cannot be written."""
    try:
        file = open(path, "wb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); give the path of a PNG file"
        ) from None
    with file:
        canvas.print_png(file)


_NUMBERS = {"samples": (int,), "share_target": (int, float), "tokens": (int,)}


def _check(records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        trained, validated = record.get("domains", {}), record.get("validation", {})
        fits = isinstance(trained, dict) and isinstance(validated, dict)
        fits = fits and (not trained or type(record.get("batch-size")) is int)
        for row in (*trained.values(), *validated.values()) if fits else ():
            fits = fits and isinstance(row, dict) and "loss" in row
            fits = fits and isinstance(row["loss"], int | float | None)
        for row in trained.values() if fits else ():
            fits = fits and all(type(row.get(key)) in kinds for key, kinds in _NUMBERS.items())
        if not fits:
            raise DataError(
                f"the record of iteration {record.get('iteration')} is not what a run writes"
            )


_NOTHING = {"samples": 0, "share_target": 0.0, "tokens": 0, "loss": None}


def _mean_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Over all tokens; None where there are none."""
    read = [row for row in rows if row["tokens"] and row["loss"] is not None]
    return (
        float(np.average([row["loss"] for row in read], weights=[row["tokens"] for row in read]))
        if read
        else None
    )


def _colors(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    if count <= 20:
        return [colormaps["tab10" if count <= 10 else "tab20"](i) for i in range(count)]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]
