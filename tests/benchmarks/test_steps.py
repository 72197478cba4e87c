"""The benchmarks of training steps run, in their shortest form, and print the ratios they
promise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, timeout: float = 1200) -> dict[str, float]:
    """The figures of a benchmark, from the last line that it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_trainer_of_the_benchmarks_takes_steps_and_evaluates() -> None:
    program = """
import json, math
from benchmarks.trainer import Trainer
words = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 32 "
    "--seq-length 8 --micro-batch-size 2 --global-batch-size 2 "
    "--train-iters 4 --lr 0.1 --position-embedding-type rope"
)
trainer = Trainer(words, 32)
trainer.evaluate(trainer.model)
print(json.dumps({"losses": [trainer.step() for _ in range(3)], "uniform": math.log(32)}))
"""
    figures = run("-c", program, timeout=120)
    assert (
        all(0 < loss < 2 * figures["uniform"] for loss in figures["losses"])
        and len(set(figures["losses"])) == 3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, promised",
    [
        (
            ("benchmarks/bf16_on_cpu.py", "--rounds", "1", "--steps", "1"),
            {f"{task}_bf16_over_float32" for task in ("training", "evaluation", "generation")},
        ),
        (
            ("benchmarks/train_step.py", "--rounds", "1", "--steps", "1"),
            {"tokens_per_second_ratio", "compiled_ratio", "bf16_over_float32"},
        ),
        (("benchmarks/checkpoint.py", "--rounds", "1"), {"async_stall_ratio"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_benchmark_prints_what_it_promises(words: tuple[str, ...], promised: set[str]) -> None:
    assert promised <= set(run(*words))
