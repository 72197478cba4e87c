#!/usr/bin/env python3
"""Write the sweeps of the study: english.yaml, scratch.yaml and continued.yaml.

    python sweeps.py out            # 40 runs
    python sweeps.py out --short    # the same with shorter runs and one share of replay

Four sizes are trained on English; then the same sizes are trained on Chinese, from scratch and from
the English weights, over three lengths. Continued training replays English.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SIZES = {
    "300k": (4, 48, 4, 128, 6e-3),
    "900k": (5, 96, 6, 256, 4e-3),
    "2M": (7, 144, 6, 384, 3e-3),
    "5M": (9, 192, 6, 512, 2e-3),
}
"""{size: layers, width, heads, width of the feed-forward layer, learning rate}."""
LENGTHS = {False: [500_000, 1_000_000, 2_000_000], True: [40_000, 80_000, 160_000]}
"""{short: tokens of the runs on Chinese}."""
ENGLISH = {False: 1_000_000, True: 80_000}
"""{short: tokens of the runs on English}."""


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true", help="shorter runs")
    arguments = parser.parse_args()
    for name, sweep in sweeps(arguments.folder, short=arguments.short).items():
        text = yaml.safe_dump(sweep, sort_keys=False)
        (arguments.folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def sweeps(folder: Path, *, short: bool) -> dict[str, dict[str, Any]]:
    """The content of the files, by name; `folder` has the runs, too."""
    sizes = {
        name: {
            "num_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "ffn_hidden_size": inner,
            "lr": rate,
        }
        for name, (layers, width, heads, inner, rate) in SIZES.items()
    }
    common = {"base": str(HERE / "run.yaml"), "sizes": sizes, "target": "zh", "keep": ["en"]}
    replayed = {"replay30": {"zh": 0.7, "en": 0.3}}
    if not short:
        replayed = {"replay10": {"zh": 0.9, "en": 0.1}, **replayed}
    runs = folder.resolve() / "runs"
    english = {"tokens": [ENGLISH[short]], "shares": {"english": {"en": 1}}}
    chinese = {"tokens": LENGTHS[short]}
    name = f"{{size}}-english-{'80k' if short else '1M'}"
    return {
        "english": common | {"runs": str(runs / "english")} | english,
        "scratch": common
        | {"runs": str(runs / "scratch")}
        | chinese
        | {"shares": {"chinese": {"zh": 1}}},
        "continued": common
        | {"runs": str(runs / "continued"), "start": str(runs / "english" / name)}
        | chinese
        | {"shares": replayed},
    }


if __name__ == "__main__":
    main()
