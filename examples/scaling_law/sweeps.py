#!/usr/bin/env python3
"""Write the sweeps of the study: english.yaml, scratch.yaml and continued.yaml.

    python sweeps.py out/full            # 40 runs
    python sweeps.py out/short --short   # 28 shorter runs, one share of replay

Four sizes are trained on English; then the same sizes are trained on Chinese, from scratch and from
the English weights, over three lengths. Continued training replays some English.
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
CHINESE = {"full": [150_000, 400_000, 1_000_000], "short": [16_000, 24_000, 36_000]}
"""Tokens of the runs on Chinese."""
ENGLISH = {"full": 400_000, "short": 24_000}
"""Tokens of the runs on English."""
REPLAY = {"full": [0.1, 0.3], "short": [0.3]}
"""Shares of English in continued training."""


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

    replay = {
        f"replay{share:.0%}".rstrip("%"): {"zh": 1 - share, "en": share} for share in REPLAY[kind]
    }
    base = f"runs/english/{{size}}-english-{ENGLISH[kind] // 1000}k"
    return {
        "curriculum.yaml": {"domains": domains, "stages": stages},
        "english.yaml": sweep("english", [ENGLISH[kind]], {"english": {"en": 1}}),
        "scratch.yaml": sweep("scratch", CHINESE[kind], {"chinese": {"zh": 1}}),
        "continued.yaml": sweep("continued", CHINESE[kind], replay, start=base),
    }


if __name__ == "__main__":
    main()
