#!/usr/bin/env python3
"""Ten training steps in every precision and recipe, compared with the results of a CPU.

    python examples/gpu_smoke/smoke.py                     # every case; on 2 GPUs also the layouts
    python examples/gpu_smoke/smoke.py --case fp8-delayed  # one case; --case may be repeated
    python examples/gpu_smoke/smoke.py --write-reference   # on a CPU: recreate reference.json

All output is in out/ next to this script; out/report.json is what to send (README.md).

Exit code 0: every case that this machine can run is within its tolerance; 1: one is not, or failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = HERE / "out"
REFERENCE = HERE / "reference.json"
FP8 = ["--bf16", "--fp8-format"]

CASES = {
    "fp32": [],
    "bf16": ["--bf16"],
    "bf16-portable": ["--bf16", "--transformer-impl", "local"],
    "fp8-delayed": [
        *FP8,
        "hybrid",
        "--fp8-recipe",
        "delayed",
        "--fp8-amax-history-len",
        "16",
        "--fp8-amax-compute-algo",
        "max",
    ],
    "fp8-tensorwise": [*FP8, "hybrid", "--fp8-recipe", "tensorwise"],
    "fp8-blockwise": [*FP8, "e4m3", "--fp8-recipe", "blockwise"],
    "fp8-mxfp8": [*FP8, "e4m3", "--fp8-recipe", "mxfp8"],
}
"""{case: flags of `chatflow train`}, each on one process."""

LAYOUTS = {
    "bf16-tp2": ["--bf16", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "bf16-pp2": ["--bf16", "--pipeline-model-parallel-size", "2"],
    "bf16-dp2": [
        "--bf16",
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
    ],
}
"""{case: flags}, each on two processes, compared with the reference of bf16."""

BF16 = {"first": 1e-3, "loss": 5e-3, "grad-norm": 0.02}
FP8_RECIPES = {"first": 3e-3, "loss": 1e-2, "grad-norm": 0.03}
"""How far a case may be from its reference: the first loss and every loss in nats, the gradient
norm of the first three steps as a fraction.
"""

NORMS = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", action="append", choices=[*CASES, *LAYOUTS], help="run this case only"
    )
    parser.add_argument(
        "--write-reference",
        action="store_true",
        help="write reference.json from this machine's CPU",
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    gpus = count_gpus()
    if arguments.write_reference and (gpus or arguments.case):
        parser.error(
            "--write-reference runs every case, without CUDA: drop --case, and set "
            "CUDA_VISIBLE_DEVICES= on a machine with GPUs"
        )
    prepare()
    names = arguments.case or [
        *CASES,
        *(LAYOUTS if gpus != 1 and not arguments.write_reference else {}),
    ]
    if gpus == 1 and set(names) & set(LAYOUTS):
        parser.error("the layouts need two GPUs, and this machine has one")
    reference = (
        {}
        if arguments.write_reference
        else json.loads(REFERENCE.read_text(encoding="utf-8"))["cases"]
    )
    results = {}
    for name in names:
        print(f"== {name}", flush=True)
        results[name] = run(name)
        if not arguments.write_reference:
            tolerance = FP8_RECIPES if name.startswith("fp8") else BF16
            results[name] |= judge(
                results[name], reference["bf16" if name in LAYOUTS else name], tolerance
            )
            print(line(results[name]), flush=True)
    return write_reference(results) if arguments.write_reference else report(results, gpus)


def count_gpus() -> int:
    """CUDA devices that torch sees."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def prepare() -> None:
    """The quickstart's sample corpora as .bin/.idx in out/data."""
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "data").mkdir(parents=True)
    for name, further in (
        ("en", ["--append-eod"]),
        ("zh", ["--append-eod"]),
        ("instruct", ["--kind", "instruct"]),
    ):
        source, model = (
            ROOT / "examples" / "quickstart" / "data" / f"{name}.jsonl",
            ROOT / "examples" / "quickstart" / "tokenizer.model",
        )
        words = [
            "--input",
            source,
            "--output-prefix",
            OUT / "data" / name,
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            model,
        ]
        call(
            [
                sys.executable,
                ROOT / "tools" / "preprocess_data.py",
                *words,
                "--workers",
                "1",
                *further,
            ],
            OUT / "preprocess.log",
            check=True,
        )


def call(words: list, log: Path, *, check: bool = False) -> tuple[int, str]:
    """Run a command in this folder; (exit code, all that it printed), which also goes to the
    log.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=HERE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with open(log, "a", encoding="utf-8") as file:
        file.write(done.stdout)
    if check and done.returncode:
        sys.exit(done.stdout)
    return done.returncode, done.stdout


def run(name: str) -> dict:
    """One case: its losses and gradient norms, the layers that computed them, or why it did not
    run.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        if name in LAYOUTS
        else []
    )
    save = OUT / name
    words = [
        "-m",
        "megatron_chatflow",
        "train",
        "--config",
        "run.yaml",
        "--save",
        save,
        "--no-save-optim",
        *(CASES | LAYOUTS)[name],
    ]
    code, printed = call([sys.executable, *launcher, *words], OUT / f"{name}.log")
    unfit = re.search(r"error: .* cannot run: (.*?); choose another --fp8-recipe", printed)
    if unfit:
        return {"refused": unfit[1]}
    if code:
        return {
            "failed": (
                f"exit code {code}; see {OUT / f'{name}.log'}: "
                f"{(printed.strip().splitlines() or ['it printed nothing'])[-1]}"
            )
        }
    records = [
        json.loads(text)
        for text in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [record for record in records if "lm loss" in record]
    layers = re.search(r"(\w+) layers on (\w+)", printed)
    return {
        "layers": f"{layers[1]} on {layers[2]}",
        "lm loss": [round(step["lm loss"], 6) for step in steps],
        "grad-norm": [round(step["grad-norm"], 6) for step in steps],
    }


def judge(result: dict, reference: dict, tolerance: dict) -> dict:
    """How far a case is from its reference, and whether that is within the tolerance."""
    if "lm loss" not in result:
        return {"verdict": "refused" if "refused" in result else "failed"}
    losses = [abs(a - b) for a, b in zip(result["lm loss"], reference["lm loss"], strict=True)]
    norms = [
        abs(a / b - 1) for a, b in zip(result["grad-norm"], reference["grad-norm"], strict=True)
    ]
    # numpy's maximum is not a number where one of the values is not, and that is within no
    # tolerance.
    off = {
        "first": losses[0],
        "loss": float(np.max(losses)),
        "grad-norm": float(np.max(norms[:NORMS])),
    }
    return {
        "off": off,
        "tolerance": tolerance,
        "verdict": "agrees" if all(off[key] <= tolerance[key] for key in off) else "DIFFERS",
    }


def line(result: dict) -> str:
    """A case on one line."""
    if "off" not in result:
        return f"   {result['verdict']}: {result.get('refused') or result.get('failed')}"
    differences = ", ".join(
        f"{key} off by {value:.2g} of {result['tolerance'][key]:g}"
        for key, value in result["off"].items()
    )
    return f"   {result['verdict']}: {differences} ({result['layers']})"


def write_reference(results: dict) -> int:
    """Write reference.json; 1 where a case did not run."""
    if any("lm loss" not in result for result in results.values()):
        print("\n".join(f"{name}: {result}" for name, result in results.items()), file=sys.stderr)
        return 1
    content = {"made with": versions(), "cases": results}
    REFERENCE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {REFERENCE}")
    return 0


def versions() -> dict:
    """What the numbers depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "megatron-core", "numpy")}


def report(results: dict, gpus: int) -> int:
    """Write out/report.json and print the summary; 1 where a case differs or failed."""
    _, doctor = call(
        [sys.executable, "-m", "megatron_chatflow", "doctor", "--full"], OUT / "doctor.log"
    )
    content = {"gpus": gpus, "doctor": doctor.splitlines(), "cases": results}
    (OUT / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n" + "\n".join(f"{name:<15} {result['verdict']}" for name, result in results.items()))
    print(f"report: {OUT / 'report.json'} (the logs of the cases are next to it)")
    return int(any(result["verdict"] in ("DIFFERS", "failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
