"""Check that two checkouts train the same model, bit for bit.

    python tests/compare_checkouts.py ../before .

Each checkout indexes the quickstart's sample text and trains a small model for 20 iterations, in
float32, in bf16 and in every FP8 recipe that a CPU runs, on one process and (float32) on four. The
corpora, all records of metrics.jsonl and the last checkpoint must be equal to the last bit;
tools/compare_runs.py compares the runs. Exit code 0 when they are, 1 when they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

SETTINGS = {
    "model": {
        "num_layers": 4,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "training": {"micro_batch_size": 4, "global_batch_size": 8, "train_iters": 20},
    "optimizer": {"lr": 3e-3, "min_lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_iters": 2},
    "data": {"seq_length": 64, "split": "900,100,0", "curriculum": "curriculum.yaml"},
    "tokenizer": {"tokenizer_type": "SentencePieceTokenizer"},
    "validation": {"eval_iters": 2},
}
CURRICULUM = {
    "clock": "samples",
    "domains": {
        "en": {"path": "en_text_document"},
        "zh": {"path": "zh_text_document"},
        "en-zh": {"path": "enzh_text_document"},
        "instruct": {"path": "instruct_document", "kind": "instruct"},
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
CORPORA = {
    "en": ("en", ["--append-eod"]),
    "zh": ("zh", ["--append-eod"]),
    "en-zh": ("enzh", ["--append-eod", "--kind", "parallel", "--template", "{en}\n{zh}"]),
    "instruct": ("instruct", ["--kind", "instruct"]),
}
FP8 = ["--bf16", "--fp8-format", "hybrid", "--fp8-recipe"]
RUNS = {
    "float32": (1, []),
    "bf16": (1, ["--bf16"]),
    "fp8 delayed": (1, [*FP8, "delayed"]),
    "fp8 tensorwise": (1, [*FP8, "tensorwise"]),
    "fp8 blockwise": (1, ["--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]),
    "float32, TP 2 x DP 2": (
        4,
        ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer"],
    ),
}


def run(checkout: Path, folder: Path, words: list[str]) -> None:
    """Run Python in `folder` with the package of `checkout`; SystemExit where it fails."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True
    )
    if result.returncode:
        sys.exit(
            f"{checkout}: {' '.join(words)}: code {result.returncode}\n{result.stderr[-3000:]}"
        )


def make_corpora(checkout: Path, folder: Path) -> dict[str, str]:
    """Index the sample text in `folder`; return {file: SHA-256}."""
    samples = checkout / "examples" / "quickstart"
    tokenizer = str(samples / "tokenizer.model")
    for name, (prefix, extra) in CORPORA.items():
        words = [str(checkout / "tools" / "preprocess_data.py"), "--output-prefix", prefix, *extra]
        words += ["--input", str(samples / "data" / f"{name}.jsonl"), "--workers", "1"]
        words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer]
        run(checkout, folder, words)
    SETTINGS["tokenizer"]["tokenizer_model"] = tokenizer
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    curriculum = yaml.safe_dump(CURRICULUM, sort_keys=False)
    (folder / "curriculum.yaml").write_text(curriculum, encoding="utf-8")
    files = sorted([*folder.glob("*.bin"), *folder.glob("*.idx")])
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def train(checkout: Path, save: Path, name: str) -> None:
    """Train one of RUNS into the run directory `save`."""
    processes, flags = RUNS[name]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [*(launch if processes > 1 else []), "-m", "megatron_chatflow", "train"]
    run(checkout, save.parent, [*words, "--config", "run.yaml", "--save", str(save), *flags])


def last_record(save: Path) -> str:
    """Return the exact loss and gradient norm of the last iteration; there must be 20."""
    lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "lm loss" in record]
    if [record["iteration"] for record in records] != list(range(1, 21)):
        sys.exit(f"{save}: {len(records)} iterations in metrics.jsonl, not 20")
    last = records[-1]
    return f"iteration 20: loss {last['lm loss']!r}, gradient norm {last['grad-norm']!r}"


def main() -> int:
    """Compare the two checkouts; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a checkout of this project")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--only", choices=list(RUNS), nargs="+", help="these runs; all by default")
    args = parser.parse_args()
    checkouts = [args.before.resolve(), args.after.resolve()]
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        # one folder for both, for a checkpoint records the paths of its corpora
        folder = Path(temporary)
        hashes = [make_corpora(checkout, folder) for checkout in checkouts]
        if hashes[0] != hashes[1]:
            names = sorted(name for name in hashes[0] if hashes[0][name] != hashes[1].get(name))
            print(f"corpora: DIFFERENT: {', '.join(names)}")
            return 1
        print(f"corpora: {len(hashes[0])} files are equal", flush=True)
        for name in args.only or RUNS:
            plain = re.sub(r"\W+", "-", name)
            saves = [folder / f"before-{plain}", folder / f"after-{plain}"]
            for checkout, save in zip(checkouts, saves, strict=True):
                train(checkout, save, name)
            words = [sys.executable, str(checkouts[1] / "tools" / "compare_runs.py"), *saves]
            env = {**os.environ, "PYTHONPATH": str(checkouts[1])}
            result = subprocess.run(words, env=env, capture_output=True, text=True)
            different += result.returncode != 0
            verdict = "DIFFERENT" if result.returncode else "equal to the last bit"
            print(f"{name}: {verdict} ({last_record(saves[1])})", flush=True)
            if result.returncode:
                print(result.stdout + result.stderr)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
