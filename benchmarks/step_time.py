"""Predicted step times against published ones, calibration rows and test rows apart.

    python benchmarks/step_time.py published.csv

The CSV has the columns of the tables in Megatron Bridge's performance summary: release, model
(LLAMA3_8B, LLAMA3_70B or LLAMA3.1_405B), system, gpus, precision (BF16, FP8, MXFP8 or NVFP4), gbs,
mbs, sequence_length, fsdp, tp, pp, cp, vp, tokens_per_sec_per_gpu.

One row per system and precision calibrates the model for that system and precision, the other rows
are the test. Rows of another model than the calibration row are also counted apart: the others are
mostly other releases of the same layout. Several splits are reported, as one split can be luck;
"every row" takes each row as the calibration of all others of its system and precision. Nothing is
fitted except one factor per calibration row and, without calibration, one factor for all.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_chatflow.config import Config, resolve
from megatron_chatflow.planner.accelerators import find_accelerator
from megatron_chatflow.planner.step_settings import StepSettings, step_settings_of
from megatron_chatflow.planner.step_time import DEFAULT_FACTOR, calibration_factor, predict_step

# (layers, hidden size, feed-forward size, heads): "The Llama 3 Herd of Models" (arXiv 2407.21783),
# table 3. Eight key heads and a vocabulary of 128,256 each, as in the released checkpoints.
MODELS = {
    "LLAMA3_8B": (32, 4096, 14336, 32),
    "LLAMA3_70B": (80, 8192, 28672, 64),
    "LLAMA3.1_405B": (126, 16384, 53248, 128),
}
VOCAB_SIZE = 128256
# FP8 in these tables is current scaling of tensors ("FP8-CS" in releases up to 25.11).
PRECISIONS = {"BF16": "bf16", "FP8": "tensorwise", "MXFP8": "mxfp8", "NVFP4": "nvfp4"}


@dataclass(frozen=True)
class Row:
    """A published measurement."""

    number: int
    release: str
    model: str
    system: str
    precision: str
    step: StepSettings
    rate: float

    @property
    def seconds(self) -> float:
        return self.step.tokens / self.rate / self.step.world_size

    def predict(self, factor: float) -> float:
        """Return predicted over published tokens/s, minus 1."""
        step = predict_step(self.step, find_accelerator(self.system), factor)
        return step.tokens_per_second_per_gpu / self.rate - 1

    @property
    def factor(self) -> float:
        return calibration_factor(self.step, find_accelerator(self.system), self.seconds)


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a CSV; columns that are not used may be missing."""
    with open(path, newline="", encoding="utf-8") as file:
        return [_row(number, record) for number, record in enumerate(csv.DictReader(file), start=2)]


def _row(number: int, record: dict[str, str]) -> Row:
    layers, hidden, ffn, heads = MODELS[record["model"]]
    gpus, tp, pp, cp = (int(record[name]) for name in ("gpus", "tp", "pp", "cp"))
    chunks = int(record["vp"]) if record["vp"] not in ("", "n/a") else 1
    # 126 layers do not divide by these pipelines: the recipes count embedding and output layer.
    counted = layers % (pp * chunks) != 0
    per_chunk = (layers + 2 * counted) // (pp * chunks)
    config = Config().replace(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        group_query_attention=True,
        num_query_groups=8,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=per_chunk if chunks > 1 else None,
        account_for_embedding_in_pipeline_split=counted,
        account_for_loss_in_pipeline_split=counted,
        sequence_parallel=tp > 1,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        micro_batch_size=int(record["mbs"]),
        global_batch_size=int(record["gbs"]),
        train_iters=1,
        bf16=True,
        seq_length=int(record["sequence_length"]),
        vocab_size=VOCAB_SIZE,
        lr=1e-4,
    )
    step = step_settings_of(resolve(config, gpus // cp), VOCAB_SIZE, gpus // cp)
    return Row(
        number=number,
        release=record["release"],
        model=record["model"],
        system=record["system"],
        precision=record["precision"],
        step=replace(
            step,
            world_size=gpus,
            context_parallel_size=cp,
            precision=PRECISIONS[record["precision"]],
            use_megatron_fsdp=record["fsdp"] not in ("", "0", "n/a"),
            # The recipes switch it off under NVFP4.
            tp_comm_overlap=tp > 1 and record["precision"] != "NVFP4",
        ),
        rate=float(record["tokens_per_sec_per_gpu"]),
    )


def _release(row: Row) -> tuple[int, ...]:
    return tuple(int(part) for part in row.release.split("."))


SPLITS: dict[str, Callable[[Row], tuple]] = {
    "fewest GPUs, newest": lambda row: (row.step.world_size, *(-n for n in _padded(row))),
    "fewest GPUs, oldest": lambda row: (row.step.world_size, *_padded(row)),
    "most GPUs, newest": lambda row: (-row.step.world_size, *(-n for n in _padded(row))),
    "most GPUs, oldest": lambda row: (-row.step.world_size, *_padded(row)),
}
"""{name: order in which the first row of a system and precision calibrates}."""


FIRST_SPLIT = "fewest GPUs, newest"
"""What a user would do: measure the smaller run, on today's software."""


def _padded(row: Row) -> tuple[int, ...]:
    return (*_release(row), 0, 0)[:3]


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each system and precision, in the order of the file."""

    def key(row: Row) -> tuple[str, str]:
        return row.system, row.precision

    return [list(group) for _, group in groupby(sorted(rows, key=key), key=key)]


def split(rows: Iterable[Row], order: Callable[[Row], tuple]) -> list[tuple[Row, list[Row]]]:
    """Return (calibration row, test rows) of each system and precision."""
    pairs = []
    for group in groups(rows):
        first = min(group, key=order)
        pairs.append((first, [row for row in group if row is not first]))
    return pairs


def calibrated(pairs: Iterable[tuple[Row, list[Row]]]) -> list[tuple[float, Row, Row]]:
    """Return (error, calibration row, test row) of every test row."""
    return [(row.predict(first.factor), first, row) for first, tests in pairs for row in tests]


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Return count, mean and largest size of the errors; 0 where there are none."""
    sizes = [abs(error) for error in errors]
    if not sizes:
        return {"rows": 0, "mean": 0.0, "worst": 0.0}
    return {"rows": len(sizes), "mean": statistics.mean(sizes), "worst": max(sizes)}


def evaluate(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the errors of every split, and those without calibration."""
    pairs = {name: split(rows, order) for name, order in SPLITS.items()}
    firsts = [first for first, _ in pairs[FIRST_SPLIT]]
    tests = [row for _, tests in pairs[FIRST_SPLIT] for row in tests]
    pairs["every row"] = [
        (first, [row for row in group if row is not first])
        for group in groups(rows)
        for first in group
    ]
    splits: dict[str, Any] = {}
    for name, found in ((name, calibrated(entry)) for name, entry in pairs.items()):
        worst = max(found, key=lambda entry: abs(entry[0]))
        splits[name] = {
            "test": summary([error for error, *_ in found]),
            "other model": summary([e for e, first, row in found if row.model != first.model]),
            "worst line": worst[2].number,
            "its calibration line": worst[1].number,
        }
    factor = math.exp(statistics.mean(math.log(row.factor) for row in firsts))
    return {
        "default_factor": factor,
        "splits": splits,
        "not calibrated": summary([row.predict(factor) for row in tests]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare predicted with published step times.")
    parser.add_argument("csv", help="published rows")
    parser.add_argument("--rows", action="store_true", help="print every row of the first split")
    args = parser.parse_args(argv)
    rows = read_rows(args.csv)
    result = evaluate(rows)
    print(f"{len(rows)} rows, {len(groups(rows))} of them calibrate in each split but the last")
    print(f"{'calibration':<22} {'test rows':<14} {'count':>6} {'mean':>7} {'worst':>7}")
    for name, parts in result["splits"].items():
        _print_summary(name, "all others", parts["test"])
        _print_summary("", "other model", parts["other model"])
    _print_summary("none, one factor", "all others", result["not calibrated"])
    print(f"\nfactor without calibration: {result['default_factor']:.3f}, in use {DEFAULT_FACTOR}")
    if args.rows:
        _print_rows(split(rows, SPLITS[FIRST_SPLIT]))
    print(json.dumps(result))
    return 0


def _print_summary(name: str, kind: str, numbers: dict[str, float]) -> None:
    mean, worst = (f"{numbers[key]:>7.1%}" for key in ("mean", "worst"))
    print(f"{name:<22} {kind:<14} {numbers['rows']:>6} {mean} {worst}")


def _print_rows(pairs: Iterable[tuple[Row, list[Row]]]) -> None:
    for first, tests in pairs:
        print(f"\n{first.system} {first.precision}: factor {first.factor:.3f}")
        for row in (first, *tests):
            step, role = row.step, "calibrates" if row is first else "test"
            error = f"{row.predict(first.factor):+.1%}"
            layout = (
                f"TP {step.tensor_model_parallel_size} PP {step.pipeline_model_parallel_size} "
                f"VP {step.chunks} CP {step.context_parallel_size} MBS {step.micro_batch_size}"
            )
            print(
                f"  line {row.number:<3} {row.release:<9} {row.model:<14} {layout:<28} "
                f"{row.rate:>7.0f} {error:>7} {role}"
            )


if __name__ == "__main__":
    sys.exit(main())
