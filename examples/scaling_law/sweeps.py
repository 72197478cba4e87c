#!/usr/bin/env python3
"""Write the sweeps of the study: english, scratch, continued and mixtures (.yaml).

    python sweeps.py out/full            # 42 runs
    python sweeps.py out/short --short   # 31 shorter runs, one share of replay over all sizes

Four sizes are trained on English; then the same sizes are trained on Chinese, from scratch and from
the English weights, over three lengths. Continued training replays some English. One size and
length has further shares, which a law of mixtures needs.
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
CHINESE = {"full": [120_000, 300_000, 800_000], "short": [16_000, 24_000, 36_000]}
"""Tokens of the runs on Chinese."""
ENGLISH = {"full": 300_000, "short": 24_000}
"""Tokens of the runs on English."""
REPLAY = {"full": [0.1, 0.3], "short": [0.3]}
"""Shares of English in continued training, for all sizes and lengths."""
MIXTURES = {"full": [0.0, 0.5], "short": [0.0, 0.1, 0.5]}
"""Further shares, for one size and length."""
SIZE, LENGTH = "900k", 1
"""That size, and the number of that length."""


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="has data/, and gets the files and runs/")
    parser.add_argument("--short", action="store_true", help="shorter runs")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    for name, content in files(folder, "short" if arguments.short else "full").items():
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def files(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """The content of the curriculum and of the sweeps, by name."""
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
    domains = {
        name: {
            "path": f"data/{name}_text_document",
            "valid": f"data/{name}_test_text_document",
        }
        for name in ("en", "zh")
    }
    stages = [{"name": "half", "at": 0, "weights": {"en": 1, "zh": 1}}]  # sweeps have their own

    def sweep(name: str, tokens: list[int], shares: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "base": str(HERE / "run.yaml"),
            "curriculum": "curriculum.yaml",
            "runs": f"runs/{name}",
            "sizes": sizes,
            "tokens": tokens,
            "shares": shares,
            "target": "zh",
            "keep": ["en"],
            **more,
        }

    base = f"runs/english/{{size}}-english-{ENGLISH[kind] // 1000}k"
    one = [CHINESE[kind][LENGTH]]
    found = {
        "curriculum": {"domains": domains, "stages": stages},
        "english": sweep("english", [ENGLISH[kind]], {"english": {"en": 1}}),
        "scratch": sweep("scratch", CHINESE[kind], {"chinese": {"zh": 1}}),
        "continued": sweep("continued", CHINESE[kind], replay(REPLAY[kind]), start=base),
        "mixtures": sweep("mixtures", one, replay(MIXTURES[kind]), start=base)
        | {"sizes": {SIZE: sizes[SIZE]}},
    }
    return {f"{name}.yaml": content for name, content in found.items()}


def replay(shares: list[float]) -> dict[str, dict[str, float]]:
    """Weights of the domains, by names such as replay30."""
    return {f"replay{round(100 * share)}": {"zh": 1 - share, "en": share} for share in shares}


if __name__ == "__main__":
    main()
