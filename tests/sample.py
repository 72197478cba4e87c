"""A small run over the sample corpora of examples/quickstart: the files that `train` needs, and how
to call it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.pool import command

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
DOMAINS = {
    "en": ("en_text_document", []),
    "zh": ("zh_text_document", []),
    "en-zh": ("enzh_text_document", ["--kind", "parallel", "--template", "{en}\n{zh}"]),
    "instruct": ("instruct_document", ["--kind", "instruct"]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "group_query_attention":
            True, "num_query_groups": 2, "ffn_hidden_size": 96,
        "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True, "attention_dropout": 0.0, "hidden_dropout":
            0.0,
    },
    "training": {"micro_batch_size": 4, "global_batch_size": 8, "train_iters": 20},
    "optimizer": {"lr": 3e-3, "min_lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_iters": 2},
    "data": {"seq_length": 64, "split": "900,100,0", "curriculum": "curriculum.yaml"},
    "tokenizer": {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model":
        str(QUICKSTART / "tokenizer.model")},
    "validation": {"eval_iters": 2},
    "logging": {"log_interval": 5},
}  # fmt: skip
CURRICULUM = {
    "clock": "samples",
    "domains": {
        name: {"path": prefix} | ({"kind": "instruct"} if name == "instruct" else {})
        for name, (prefix, _) in DOMAINS.items()
    },
    "stages": [
        {"name": "english", "at": 0, "weights": {"en": 0.7, "en-zh": 0.3}},
        {
            "name": "bilingual",
            "at": 48,
            "weights": {"en": 0.3, "zh": 0.5, "en-zh": 0.2},
            "ramp": "root2",
        },
        {
            "name": "instruct",
            "at": 112,
            "weights": {"en": 0.1, "zh": 0.3, "instruct": 0.6},
            "ramp": "linear",
        },
    ],
}


def build(folder: Path) -> Path:
    """Corpora, curriculum.yaml and run.yaml in `folder`; returns it."""
    import sys

    from megatron_chatflow.cli.preprocess import main as preprocess

    for name, (prefix, extra) in DOMAINS.items():
        append = [] if name == "instruct" else ["--append-eod"]
        words = [
            "--input",
            QUICKSTART / "data" / f"{name}.jsonl",
            "--output-prefix",
            folder / prefix.split("_")[0],
            "--workers",
            "1",
            *append,
            *extra,
        ]
        words += [
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            QUICKSTART / "tokenizer.model",
        ]
        assert preprocess([str(word) for word in words]) == 0, sys.stderr
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    (folder / "curriculum.yaml").write_text(
        yaml.safe_dump(CURRICULUM, sort_keys=False), encoding="utf-8"
    )
    return folder


def train(folder: Path, *words: str) -> tuple[int, str, str]:
    """`chatflow train` on this rank, with the settings of `build` and further flags."""
    return command("train", "--config", str(folder / "run.yaml"), *words)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's iterations, without the times and the branch."""
    records = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    left_out = ("time", "branch")
    return [
        {key: value for key, value in record.items() if key not in left_out}
        for record in records
        if "lm loss" in record
    ]


def largest_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """The largest relative difference of `lm loss` between two runs over the same iterations and
    samples.
    """
    assert [(r["iteration"], r["samples"]) for r in a] == [
        (r["iteration"], r["samples"]) for r in b
    ]
    assert a
    return max(abs(x["lm loss"] / y["lm loss"] - 1) for x, y in zip(a, b, strict=True))
