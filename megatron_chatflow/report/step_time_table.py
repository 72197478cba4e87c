"""What `preflight --time` and `--search` print: the parts of a step, and a ranking of layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PARTS = {
    "products": "matrix products",
    "attention": "attention",
    "memory": "kernels that move bytes",
    "launches": "kernel launches",
    "tensor_parallel": "tensor-parallel collectives, exposed",
    "context_parallel": "context-parallel transfers, exposed",
    "bubble": "pipeline bubble",
    "pipeline_parallel": "pipeline transfers, exposed",
    "data_parallel": "data-parallel collectives, exposed",
    "optimizer": "optimizer",
}
_SHOWN = 10
_COLUMNS = ("rank", "TP", "PP", "VP", "DP", "MBS", "recompute", "GiB", "s/step", "tokens/s", "MFU")


def step_time_facts(time: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield (name, text) of the summary's lines about a predicted step."""
    hours = f"; {_duration(time['run_hours'])} for the run" if "run_hours" in time else ""
    yield (
        "step",
        f"{time['seconds']:.3g} s on {time['accelerator']} (predicted), "
        f"{time['tokens_per_second']:,.0f} tokens/s, {time['tokens_per_second_per_gpu']:,.0f} per "
        f"GPU, MFU {time['mfu']:.1%} of the {time['peak']} peak{hours}",
    )


def search_facts(
    search: Mapping[str, Any], world_size: int, gpu_memory_gib: float
) -> Iterable[tuple[str, str]]:
    """Yield (name, text) of the summary's lines about a search."""
    batch, length = search["global_batch_size"], search["seq_length"]
    yield "cluster", f"{world_size:,} x {search['accelerator']} with {gpu_memory_gib:g} GiB"
    yield "batch", f"{batch:,} samples, {batch * length:,} tokens, for every layout"


def step_time_lines(time: Mapping[str, Any]) -> list[str]:
    """Return the parts of a predicted step as text, without those that take no time."""
    rows = [
        (_PARTS[name], f"{seconds:.3g}", f"{seconds / time['seconds']:.1%}")
        for name, seconds in time["parts"].items()
        if seconds
    ]
    width = max(len(name) for name, *_ in rows)
    return [
        "time of a step on the slowest pipeline stage, seconds",
        *(f"  {name:<{width}} {seconds:>9} {share:>6}" for name, seconds, share in rows),
    ]


def search_lines(layouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fastest layouts as text; * marks stages that count embedding and output layer."""
    rows = [_COLUMNS, *(_row(i, layout) for i, layout in enumerate(layouts[:_SHOWN], start=1))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    more = len(layouts) - _SHOWN
    return [
        "layouts that fit, by predicted step time (VP: model chunks of a stage; *: embedding and "
        "output layer count as layers)",
        *(
            "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ),
        *([f"  and {more:,} slower ones; --json has all"] if more > 0 else []),
    ]


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.2g} minutes"


def _row(rank: int, layout: Mapping[str, Any]) -> tuple[str, ...]:
    recompute = layout["recompute_granularity"] or "-"
    if layout["recompute_modules"]:
        recompute = ",".join(layout["recompute_modules"])
    counted = layout["account_for_loss_in_pipeline_split"]
    return (
        str(rank),
        str(layout["tensor_model_parallel_size"]),
        str(layout["pipeline_model_parallel_size"]) + ("*" if counted else ""),
        str(layout["virtual_pipeline_model_parallel_size"]),
        str(layout["data_parallel_size"]),
        str(layout["micro_batch_size"]),
        recompute,
        f"{layout['memory_gib']:.3g}",
        f"{layout['seconds']:.3g}",
        f"{layout['tokens_per_second']:,.0f}",
        f"{layout['mfu']:.1%}",
    )
