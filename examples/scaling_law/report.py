#!/usr/bin/env python3
"""Write a page with the runs, the law and the proposal: python report.py out/full"""

import argparse
import base64
import csv
import html
import json
from pathlib import Path

STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto}pre{background:#eee;padding:1em}"
)
STYLE += "td,th{padding:.1em .8em;text-align:right}img{max-width:100%}"
COLUMNS = ("name", "kind", "params", "tokens", "replay", "loss", "bits_per_byte", "seed")


def main() -> None:
    """Write FOLDER/report.html."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    parts = ["<h1>A scaling law in miniature</h1>"]
    for name, title in (("fit", "The law of Chinese"), ("propose", "Proposed shares")):
        parts.append(
            f"<h2>{title}</h2><pre>{html.escape((folder / f'{name}.txt').read_text())}</pre>"
        )
        if name == "fit":
            parts += [image(path) for path in sorted(folder.glob("law*.png"))]
    parts.append(f"<h2>Runs</h2><p>{hours(folder):.2f} hours of training steps in all.</p>")
    for kind in ("english", "scratch", "continued", "mixtures"):
        parts.append(f"<h3>{kind}</h3>{table(folder / 'runs' / kind / 'runs.csv')}")
    head = f'<!doctype html><meta charset="utf-8"><title>Scaling law</title><style>{STYLE}</style>'
    (folder / "report.html").write_text(head + "\n".join(parts) + "\n", encoding="utf-8")
    print(f"report: {folder / 'report.html'}")


def image(path: Path) -> str:
    """The picture in the page itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}"></p>'


def hours(folder: Path) -> float:
    """The time of all training steps; a branch has its own steps only."""
    seconds = 0.0
    for path in folder.glob("runs/*/*/metrics.jsonl"):
        branch = json.loads((path.parent / "lineage.json").read_text())["branch"]
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "time" in record and record["branch"] == branch:
                seconds += record["time"]["iteration-time"]
    return seconds / 3600


def table(path: Path) -> str:
    """The rows of a table of runs."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["language", *(name for name in COLUMNS if name in rows[0])]
    cells = [columns, *([row[name][:24] for name in columns] for row in rows)]
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


if __name__ == "__main__":
    main()
