"""What `fit` prints of a fitted law."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_chatflow.report import columns

Report = Mapping[str, Any]
_INFLUENTIAL = 5


def law_table(report: Report) -> list[str]:
    """Return the lines of a report of one law; parts that it does not have are left out."""
    return [
        *_head(report),
        *_constants(report),
        *_quality(report),
        *_influence(report),
        *_allocation(report),
        *_gains(report),
        *_predictions(report),
        *_proposals(report),
        *report.get("lines", ()),
        *(f"warning: {warning}" for warning in report.get("warnings", ())),
    ]


def short(value: float | None) -> str:
    """Return a count in short, e.g. 1.3B."""
    if value is None:
        return "-"
    value = float(f"{value:.3g}")
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size <= abs(value) < 1e15:
            return f"{value / size:,.4g}{letter}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def _head(report: Report) -> Iterator[str]:
    name = f"{report['language']}: " if report.get("language") else ""
    yield f"{name}{report['form']} form, {report['runs']} runs: L = {report['formula']}"


def _constants(report: Report) -> Iterator[str]:
    found = report["constants"]
    bootstrap = any("bootstrap_low" in value for value in found.values())
    rows = [["constant", "estimate", "95% interval", *(["bootstrap"] if bootstrap else [])]]
    for name, value in found.items():
        cells = [name, _digits(value["estimate"]), _range(value["low"], value["high"])]
        if bootstrap:
            cells.append(_range(value.get("bootstrap_low"), value.get("bootstrap_high")))
        rows.append(cells)
    yield from _table(rows)


def _quality(report: Report) -> Iterator[str]:
    if "residual_deviation" not in report:
        return
    yield (
        f"residuals {report['residual_deviation']:.2%} of the loss, condition number "
        f"{report['condition_number']:.0f}, {report['degrees_of_freedom']} degrees of freedom"
    )
    left = report["left_out"]
    if "rms" in left:
        count = f"{left['runs']} run{'s' * (left['runs'] > 1)}"
        yield (
            f"fitted without the largest size ({short(left['params'])}, {count}): error there "
            f"{left['rms']:.2%} rms, {left['worst']:.2%} at most"
        )
    else:
        yield f"no error on the largest size: {left['why_not']}"
    if len(report["forms"]) > 1:
        rows = [["form", "constants", "residuals", "largest size", "AICc", ""]]
        for form in report["forms"]:
            error = form["left_out_rms"]
            rows.append(
                [
                    form["form"],
                    str(form["constants"]),
                    f"{form['residual_deviation']:.2%}",
                    "-" if error is None else f"{error:.2%}",
                    f"{form['aicc']:.1f}",
                    "chosen" if form["chosen"] else "",
                ]
            )
        yield from _table(rows)


def _influence(report: Report) -> Iterator[str]:
    if "influence" not in report:
        return
    names = [n for n, value in report["constants"].items() if not value.get("fixed")]
    exponents = [n for n in names if n[0].islower()]
    yield f"the most influential runs, and {', '.join(exponents)} without each"
    rows = [["run", "N", "D", "residual", "Cook's distance", *exponents]]
    for run in report["influence"]["runs"][:_INFLUENTIAL]:
        rows.append(
            [
                run["name"],
                short(run["params"]),
                short(run["tokens"]),
                f"{run['residual']:+.2%}",
                f"{run['cook']:.2f}",
                *(f"{run['constants_without'][name]:.3f}" for name in exponents),
            ]
        )
    together = report["influence"]["without_top"]
    if together["constants"] is not None:
        values = [f"{together['constants'][name]:.3f}" for name in exponents]
        rows.append([f"without these {len(together['names'])}", "", "", "", "", *values])
    estimates = [f"{report['constants'][name]['estimate']:.3f}" for name in exponents]
    rows.append(["with all runs", "", "", "", "", *estimates])
    yield from _table(rows)


def _allocation(report: Report) -> Iterator[str]:
    for kind, found in report.get("allocation", {}).items():
        a, b = found["size_exponent"], found["length_exponent"]
        if a["estimate"] is None:
            yield f"{kind}: no best split of compute: the law has gamma above alpha or beta"
            continue
        yield (
            f"{kind}: best N ~ C^{a['estimate']:.3f} {_between(a)}, D ~ C^{b['estimate']:.3f} "
            f"{_between(b)}, with C = 6 N D"
        )
        rows = [["FLOPs", "N", "95%", "D", "95%", "D / N", "loss", "95%", "given away"]]
        for row in found["budgets"]:
            rows.append(
                [
                    f"{row['flops']:.2e}",
                    *(x for n in ("params", "tokens") for x in _counted(row[n])),
                    f"{row['tokens_per_parameter']:.1f}",
                    f"{row['loss']['estimate']:.4f}",
                    _range(row["loss"].get("low"), row["loss"].get("high")),
                    "-" if row["given_away"] is None else f"{row['given_away']:.3%}",
                ]
            )
        yield from _table(rows)
        yield from _given_sizes(report["given_sizes"].get(kind, ()))
    flops = [row["flops"] for f in report.get("allocation", {}).values() for row in f["budgets"]]
    if flops:
        yield (
            "given away: how far the loss of this N and D is above the lowest for the budget; less "
            "in 95% of the refits"
        )
        beyond = max(flops) / report["largest_flops"]
        if beyond > 1.5:
            yield f"the largest budget is {beyond:.3g} times the largest run's"


def _given_sizes(rows: Sequence[Report]) -> Iterator[str]:
    if not rows:
        return
    table = [["FLOPs", "given N", "D", "loss", "95%", "given away"]]
    for row in rows:
        table.append(
            [
                f"{row['flops']:.2e}",
                short(row["params"]),
                short(row["tokens"]),
                f"{row['loss']['estimate']:.4f}",
                _range(row["loss"].get("low"), row["loss"].get("high")),
                "-" if row["given_away"]["estimate"] is None else _percent(row["given_away"]),
            ]
        )
    yield from _table(table)


def _gains(report: Report) -> Iterator[str]:
    for row in report.get("compute_saved", ()):
        saved = row["saved"]
        if saved["estimate"] is not None:
            yield (
                f"compute saved against scratch at equal loss, {row['flops']:.2e} FLOPs: "
                f"{_percent(saved)}"
            )
    for row in report.get("transferred_tokens", ()):
        value = row["transferred"]
        if value["estimate"] is not None:
            low, high = short(value.get("low")), short(value.get("high"))
            yield (
                f"effectively transferred at N = {short(row['params'])}, D = "
                f"{short(row['tokens'])}: {short(value['estimate'])} tokens ({low} to {high})"
            )


def _predictions(report: Report) -> Iterator[str]:
    found = report.get("predictions", ())
    if found:
        yield "predicted loss of new runs, with the interval of one run"
        yield from _table(
            [
                ["N", "D", "kind", "loss", "95%"],
                *(
                    [
                        f"{row['params']:,}",
                        f"{row['tokens']:,}",
                        row["kind"],
                        f"{row['loss']['estimate']:.5f}",
                        _range(row["loss"]["low"], row["loss"]["high"]),
                    ]
                    for row in found
                ),
            ]
        )


def _proposals(report: Report) -> Iterator[str]:
    found = report.get("proposals", ())
    if found:
        yield "runs that would determine the constants most, the first most"
        rows = [["run", "kind", "N", "D", "volume of the confidence region"]]
        for row in found:
            size, length = short(row["params"]), short(row["tokens"])
            rows.append(
                [row["name"], row["kind"], size, length, f"divided by {row['shrinks']:.2f}"]
            )
        yield from _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = columns.widths(rows)
    return [columns.line(row, widths) for row in rows]


def _digits(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def _range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_digits(low)} to {_digits(high)}"


def _between(value: Report) -> str:
    low, high = value.get("low"), value.get("high")
    return "" if low is None or high is None else f"({low:.3f} to {high:.3f})"


def _counted(value: Report) -> tuple[str, str]:
    low, high = value.get("low"), value.get("high")
    between = "-" if low is None or high is None else f"{short(low)} to {short(high)}"
    return short(value["estimate"]), between


def _percent(value: Report) -> str:
    low, high = value.get("low"), value.get("high")
    between = "" if low is None or high is None else f" ({low:.1%} to {high:.1%})"
    return f"{value['estimate']:.1%}{between}"
