"""What `preflight` prints: a summary, step time, memory of each stage, notes, the verdict."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_chatflow.report.step_time_table import (
    search_facts,
    search_lines,
    step_time_facts,
    step_time_lines,
)

_GIB = 2**30
_COLUMNS = ("weights", "fp8_weights", "gradients", "optimizer", "activations", "logits", "total")


def preflight_table(result: Mapping[str, Any]) -> str:
    """Return the result of `preflight` as text.

    Args:
        result: what ``--json`` prints; of the parts `model`, `layout`, `batch`, `run`, `time`,
            `search`, `checkpoint` and `data`, those that are known.

    Returns:
        Lines without a newline at the end; the last ones are the verdict.
    """
    lines = [f"{name:<11} {text}" for name, text in _facts(result)]
    if result.get("time"):
        lines += ["", *step_time_lines(result["time"])]
    if (result.get("search") or {}).get("layouts"):
        lines += ["", *search_lines(result["search"]["layouts"]), ""]
    if result.get("stages"):
        lines += ["", *_memory(result["stages"]), ""]
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(
        [*lines, *(f"verdict: {result['verdict']}: {reason}" for reason in result["reasons"])]
    )


def _facts(result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if search := result.get("search"):
        yield from search_facts(search, result["world_size"], result["gpu_memory_gib"])
    if model := result.get("model"):
        padding = (
            f", padded to {model['padded_vocab_size']:,}"
            if model["padded_vocab_size"] != model["vocab_size"]
            else ""
        )
        yield (
            "model",
            (
                f"{model['parameters']:,} parameters; vocabulary "
                f"{model['vocab_size']:,}{padding}; {model['precision']}"
            ),
        )
    if layout := result.get("layout"):
        chunks = f" in {layout['virtual']} chunks each" if layout["virtual"] > 1 else ""
        sizes = f"TP {layout['tensor']} x PP {layout['pipeline']}{chunks} x DP {layout['data']}"
        yield (
            "layout",
            f"{result['world_size']} processes = {sizes}"
            + "".join(
                f", {name.replace('_', ' ')}"
                for name in ("sequence_parallel", "distributed_optimizer")
                if layout[name]
            ),
        )
    if built := result.get("built"):
        yield (
            "built",
            (
                f"{built['ranks']} ranks without memory in {built['seconds']:.1f} s; their "
                f"parameters agree with the closed form"
            ),
        )
    if batch := result.get("batch"):
        yield (
            "batch",
            (
                f"{batch['samples']:,} samples, {batch['tokens']:,} tokens = "
                f"{batch['micro_batches']} micro-batches of {batch['micro_batch_size']} x DP"
            ),
        )
        if batch["bubble"]:
            yield (
                "bubble",
                (
                    f"{batch['bubble']:.1%} of the computing time, "
                    f"{batch['bubble'] / (1 + batch['bubble']):.1%} of the total"
                ),
            )
    if run := result.get("run"):
        yield (
            "run",
            (
                f"{run['iterations']:,} iterations, {run['samples']:,} samples, "
                f"{run['tokens']:,} tokens, {run['flops']:.3g} FLOPs (model)"
            ),
        )
    if time := result.get("time"):
        yield from step_time_facts(time)
    if checkpoint := result.get("checkpoint"):
        kept = (
            (
                f"; {checkpoint['count']:,} by the end: "
                f"{_size(checkpoint['count'] * checkpoint['bytes'])}"
            )
            if checkpoint["count"]
            else ""
        )
        yield "checkpoint", f"{_size(checkpoint['bytes'])} each{kept}"
    for i, domain in enumerate((result.get("data") or {}).get("domains", ())):
        yield (
            "" if i else "data",
            f"{domain['name']}: {domain['samples']:,} samples, read {domain['epochs']:.2f} times",
        )


def _memory(stages: Sequence[Mapping[str, int]]) -> list[str]:
    """Return a row for each run of pipeline stages with the same needs."""
    columns = [name for name in _COLUMNS if any(s[name] for s in stages)]
    rows = [("stage", "layers", "parameters", *(name.replace("_", " ") for name in columns))]
    for _, group in itertools.groupby(
        stages, key=lambda s: [s[name] for name in ("layers", "parameters", *columns)]
    ):
        alike = list(group)
        first, last = alike[0]["stage"], alike[-1]["stage"]
        label = str(first) if first == last else f"{first}-{last}"
        rows.append(
            (
                label,
                str(alike[0]["layers"]),
                f"{alike[0]['parameters']:,}",
                *(f"{alike[0][name] / _GIB:.2f}" for name in columns),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head = (
        f"memory of one process of each pipeline stage, GiB (fullest: stage "
        f"{max(stages, key=lambda s: s['total'])['stage']})"
    )
    return [
        head,
        *(
            "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ),
    ]


def _size(number: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return (
                f"{number / size:.3g} {unit}"
                if number < 999.5 * size
                else f"{number / size:,.0f} {unit}"
            )
    return f"{number / 1000:.3g} kB"
