"""``preflight --time`` and ``--search`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.planner.step_time import DEFAULT_FACTOR
from tests.pool import command

SMALL = """
model: {num_layers: 4, hidden_size: 256, num_attention_heads: 4, normalization: RMSNorm,
        position_embedding_type: rope, swiglu: true, add_bias_linear: false,
        attention_dropout: 0.0, hidden_dropout: 0.0}
training: {micro_batch_size: 1, global_batch_size: 16, train_iters: 1000, bf16: true}
optimizer: {lr: 1.0e-3}
data: {seq_length: 512}
tokenizer: {vocab_size: 1000}
"""


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    (tmp_path / "run.yaml").write_text(SMALL)
    return ["preflight", "--config", str(tmp_path / "run.yaml"), "--gpus", "8"]


def result_of(*words: str) -> dict[str, Any]:
    code, out, err = command(*words, "--json")
    assert (code, err) == (0, ""), out
    return json.loads(out)


def test_the_predicted_step_is_printed_with_its_parts_and_its_error(run: list[str]) -> None:
    words = [*run, "--time", "--accelerator", "H100-SXM"]
    result = result_of(*words)
    time = result["time"]
    assert sum(time["parts"].values()) == pytest.approx(time["seconds"])
    assert time["tokens_per_second"] == pytest.approx(16 * 512 / time["seconds"])
    assert time["run_hours"] == pytest.approx(1000 * time["seconds"] / 3600)
    assert (time["factor"], time["calibrated"], time["precision"]) == (
        DEFAULT_FACTOR,
        False,
        "bf16",
    )
    code, out, _ = command(*words)
    assert code == 0
    for part in ("s on H100-SXM (predicted), ", "MFU ", "  matrix products", "not run on a GPU"):
        assert part in out
    assert "at most (benchmarks/step_time.py)" in out and "pipeline bubble" not in out


def test_a_measured_step_is_predicted_as_measured_and_others_relative_to_it(
    run: list[str],
) -> None:
    words = [*run, "--time", "--accelerator", "dgx-h100"]
    plain = result_of(*words)["time"]
    rate = plain["tokens_per_second"] / 2
    slow = result_of(*words, "--calibrate", f"tokens_per_sec={rate}")
    assert slow["time"]["tokens_per_second"] == pytest.approx(rate)
    assert slow["time"]["factor"] == pytest.approx(2 * DEFAULT_FACTOR)
    assert slow["time"]["calibrated"] and "calibrated by one measured step" in slow["notes"][-1]
    other = ["gpus=2", "tensor_model_parallel_size=2", "sequence_parallel=true"]
    elsewhere = result_of(*words, "--calibrate", f"tokens_per_sec={rate}", *other)
    assert elsewhere["time"]["factor"] != slow["time"]["factor"]


def test_search_ranks_layouts_and_gives_the_flags_of_the_fastest(run: list[str]) -> None:
    words = [*run, "--search", "--accelerator", "H100-SXM"]
    result = result_of(*words)
    layouts = result["search"]["layouts"]
    assert len(layouts) > 20 and result["gpu_memory_gib"] == 80
    assert [one["seconds"] for one in layouts] == sorted(one["seconds"] for one in layouts)
    code, out, _ = command(*words)
    lines = out.splitlines()
    assert code == 0 and lines[0] == "cluster     8 x H100-SXM with 80 GiB"
    assert lines[1] == "batch       16 samples, 8,192 tokens, for every layout"
    assert lines[4].split()[:5] == ["rank", "TP", "PP", "VP", "DP"]
    assert "not run on a GPU" in out and layouts[0]["flags"] in out.splitlines()[-1]
    flags = result_of(*run, "--time", "--accelerator", "H100-SXM", *layouts[0]["flags"].split())
    assert flags["time"]["seconds"] == pytest.approx(layouts[0]["seconds"])


def test_a_search_in_which_nothing_fits_says_what_is_needed(run: list[str]) -> None:
    words = [*run, "--search", "--accelerator", "H100-SXM", "--gpu-memory-gib", "0.001"]
    code, out, _ = command(*words)
    assert code == 1 and "verdict: does not fit: none of " in out and "the smallest needs" in out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--time"], "--time needs the GPU; give --accelerator NAME"),
        (["--search"], "--search needs the GPU; give --accelerator NAME"),
        (["--calibrate", "tokens_per_sec=1"], "has no effect without --time or --search"),
        (["--accelerator", "H100"], "did you mean H100-SXM?"),
        (["tokens_per_sec=-1"], "tokens_per_sec is -1, not a positive number"),
        (["gpus=8"], "tokens_per_sec is None"),
        (["tokens_per_sec=9", "gpus=0"], "gpus is 0, not a positive integer"),
        (["tokens_per_s=9"], "did you mean tokens_per_sec?"),
        (["9000"], "'9000' is not KEY=VALUE"),
        (["tokens_per_sec=9", "micro_batch_size=two"], "'two' is not an integer"),
    ],
)
def test_flags_that_cannot_be_used_are_one_message(
    run: list[str], words: list[str], part: str
) -> None:
    if not words[0].startswith("--"):
        words = ["--time", "--accelerator", "H100-SXM", "--calibrate", *words]
    code, out, err = command(*run, *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and part in err


def test_a_measured_run_that_could_not_start_is_refused(run: list[str]) -> None:
    measured = ["--calibrate", "tokens_per_sec=9", "tensor_model_parallel_size=3"]
    code, out, _ = command(*run, "--time", "--accelerator", "H100-SXM", *measured)
    assert code == 2 and "calibrate: the measured run cannot have had these settings" in out


def test_fp8_on_an_accelerator_without_it_is_refused(run: list[str]) -> None:
    words = ["--time", "--accelerator", "A100-SXM-80GB", "--fp8-format", "hybrid"]
    code, out, _ = command(*run, *words)
    assert code == 2 and "A100-SXM-80GB has no fp8 products" in out
