"""preflight: LLaMA-2-70B on 512 GPUs that are not there, the same broken in one place at a time,
and small runs with their corpora.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chatflow.report.preflight_table import preflight_table
from tests.pool import Pool, command
from tests.sample import CURRICULUM, SETTINGS

EXAMPLE = Path(__file__).parents[2] / "examples" / "llama2_70b_preflight.yaml"
GIB = 2**30


@pytest.fixture(scope="module")
def llama() -> tuple[int, dict[str, Any], float]:
    """(exit code, result, seconds) of the example, in its own process."""
    begin = time.monotonic()
    call = [
        sys.executable,
        "-m",
        "megatron_chatflow",
        "preflight",
        "--config",
        str(EXAMPLE),
        "--world-size",
        "512",
        "--json",
    ]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.stderr == "" and done.stdout.count("\n") == 1, done.stderr
    return done.returncode, json.loads(done.stdout), time.monotonic() - begin


def test_llama2_70b_in_fp8_on_512_gpus_fits_and_takes_less_than_a_minute(llama: Any) -> None:
    code, result, seconds = llama
    assert (code, result["verdict"]) == (0, "fits") and seconds < 60
    assert (
        result["built"]["ranks"] == 64
        and result["model"]["precision"] == "FP8 hybrid (tensorwise) and bf16"
    )


@pytest.mark.slow
def test_the_example_that_teaches_llama2_7b_chinese_fits_and_lacks_its_corpora_alone() -> None:
    config = EXAMPLE.with_name("llama2_7b_zh") / "run.yaml"
    code, out, _ = command(
        "preflight",
        "--config",
        str(config),
        "--world-size",
        "16",
        "--vocab-size",
        "40076",
        "--json",
    )
    result = json.loads(out)
    assert code == 2 and [line.split(":")[0] for line in result["reasons"]] == [
        "domain en",
        "domain zh",
        "domain en-zh",
        "domain instruct",
    ]
    assert (
        result["model"]["parameters"] == 6_738_415_616 + 2 * 8076 * 4096
    )  # LLaMA-2-7B's own number, and the new rows


def test_the_numbers_of_llama2_70b_are_those_of_arithmetic_by_hand(llama: Any) -> None:
    _, result, _ = llama
    matrices = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    total = 80 * (matrices + 2 * 8192) + 8192 + 2 * 32000 * 8192
    assert result["model"]["parameters"] == total == 68_976_648_192
    layers, embedding = 10 * (matrices // 8 + 2 * 8192), 32000 * 8192 // 8
    ranks = [layers + embedding, *[layers] * 6, layers + embedding + 8192]
    assert [stage["parameters"] for stage in result["stages"]] == ranks
    for stage, parameters in zip(result["stages"], ranks, strict=True):
        assert (
            stage["weights"] == 2 * parameters
            and stage["gradients"] == 4 * parameters
            and stage["optimizer"] == 12 * parameters // 8
        )
        assert stage["fp8_weights"] == 2 * 10 * matrices // 8
        assert stage["total"] == sum(
            stage[name]
            for name in (
                "weights",
                "fp8_weights",
                "gradients",
                "optimizer",
                "activations",
                "logits",
            )
        )
    assert result["batch"]["micro_batches"] == 1024 // 8 and result["batch"]["bubble"] == 7 / (
        2 * 128
    )
    assert (
        result["run"]["iterations"] == 12_000_000 // 1024
        and result["run"]["tokens"] == 12_000_000 * 4096
    )
    flops = 6 * (80 * matrices + 32000 * 8192) + 12 * 80 * 8192 * 4096
    assert result["run"]["flops"] == pytest.approx(flops * 12_000_000 * 4096)
    assert result["checkpoint"] == {"bytes": 14 * total, "count": 12}
    # A layer's token in FP8: norms' inputs, products' inputs in one byte, q k v and again q k,
    # attention's output, SwiGLU, rotary tables.
    shared = 2 * (10240 + 9216 + 8192) + 4 * 64 + 8192 + 2 * 2 * 28672 + 28672
    layer = (2 * (2 * 8192 + 4) + 2 * 8192 + shared) // 8 + 2 * 128 * 2
    assert result["stages"][0]["activations"] == pytest.approx(
        4096 * (layer * 5 + 2 * 8192 // 8) * (2 * 7 + 8 + 1), rel=0.001
    )


def test_the_table_shows_what_was_found(llama: Any) -> None:
    text = preflight_table(llama[1])
    for part in (
        "68,976,648,192 parameters; vocabulary 32,000; FP8 hybrid (tensorwise) and bf16",
        "512 processes = TP 8 x PP 8 in 2 chunks each x DP 8",
        "128 micro-batches of 1 x DP",
        "note: fp8_recipe tensorwise needs compute capability 8.9",
    ):
        assert part in text
    assert text.splitlines()[-1].startswith("verdict: fits: stage 0 needs ")
    assert max(map(len, text.splitlines())) < 150


BROKEN: dict[str, tuple[int, list[str], list[str]]] = {
    "a tensor-parallel size that does not divide the heads": (
        504,
        ["--tensor-model-parallel-size", "3"],
        ["num_attention_heads 64", "size 3"],
    ),
    "a pipeline that does not divide the layers": (
        448,
        ["--pipeline-model-parallel-size", "7"],
        ["num_layers 80", "pipeline_model_parallel_size 7"],
    ),
    "processes that the layout does not fill": (
        500,
        [],
        ["500 processes are not a multiple", "8 x pipeline_model_parallel_size 8"],
    ),
    "a batch that the replicas cannot share": (
        512,
        ["--global-batch-size", "1000", "--micro-batch-size", "3"],
        ["global_batch_size 1000", "size 8"],
    ),
    "micro-batches that interleaving cannot use": (
        512,
        ["--global-batch-size", "72"],
        ["9 micro-batches per rank", "interleaved"],
    ),
    "a sequence that tensor ranks cannot split": (
        512,
        ["--seq-length", "4100"],
        ["seq_length 4100", "sequence_parallel"],
    ),
    "gradients in E5M2 under blocks": (
        512,
        ["--fp8-recipe", "mxfp8"],
        ["fp8_format hybrid with fp8_recipe mxfp8", "--fp8-format e4m3"],
    ),
    "a side that FP8 kernels do not take": (
        512,
        ["--fp8-format", "e4m3", "--fp8-recipe", "mxfp8", "--ffn-hidden-size", "28800"],
        ["ffn_hidden_size / tensor_model_parallel_size 8 is 3600", "multiple of 32"],
    ),
    "FP8 without Transformer Engine": (
        512,
        ["--transformer-impl", "local"],
        ["fp8_format hybrid needs Transformer Engine", "--transformer-impl"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_llama2_70b_is_refused_with_the_message_that_helps(name: str) -> None:
    world, words, parts = BROKEN[name]
    code, out, err = command(
        "preflight", "--config", str(EXAMPLE), "--world-size", str(world), *words
    )
    assert (code, err) == (2, "") and out.startswith("verdict: refused: ")
    for part in parts:
        assert part in out


def test_refusals_are_json_too() -> None:
    code, out, _ = command("preflight", "--config", str(EXAMPLE), "--world-size", "500", "--json")
    result = json.loads(out)
    assert (code, result["verdict"], len(result["reasons"])) == (2, "refused", 1)


def test_an_unknown_vocabulary_is_refused(tmp_path: Path) -> None:
    settings = {
        key: value
        for key, value in yaml.safe_load(EXAMPLE.read_text()).items()
        if key != "tokenizer"
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    code, out, _ = command(
        "preflight", "--config", str(tmp_path / "run.yaml"), "--world-size", "512"
    )
    assert code == 2 and "the size of the vocabulary is not known; give --vocab-size" in out


def preflight(folder: Path, *words: str) -> tuple[int, str, str]:
    return command("preflight", "--config", str(folder / "run.yaml"), "--world-size", "8", *words)


LAYOUT = [
    "--tensor-model-parallel-size",
    "2",
    "--pipeline-model-parallel-size",
    "2",
    "--global-batch-size",
    "8",
]


def test_a_run_with_its_corpora_is_checked_completely(pool: Pool, sample: Path) -> None:
    ((code, out, err),) = pool.run(1, preflight, sample, *LAYOUT, "--json")
    assert code == 0, out + err
    result = json.loads(out)
    assert (
        result["built"]["ranks"] == 4
        and result["layout"]["data"] == 2
        and result["model"]["vocab_size"] == 4096
    )
    assert {domain["name"] for domain in result["data"]["domains"]} == set(CURRICULUM["domains"])
    assert sum(domain["samples"] for domain in result["data"]["domains"]) == 160


def test_what_does_not_fit_is_reported_with_advice(pool: Pool, sample: Path) -> None:
    ((code, out, _),) = pool.run(1, preflight, sample, *LAYOUT, "--gpu-memory-gib", "0.001")
    assert code == 1
    last = out.splitlines()[-1]
    assert (
        last.startswith("verdict: does not fit: stage ")
        and "add --use-distributed-optimizer" in last
    )


def test_every_missing_corpus_is_a_line_of_the_verdict_and_the_rest_is_still_reported(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    for path in sample.glob("*_document.*"):
        if not path.name.startswith(("zh_", "enzh_")):
            shutil.copy(path, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    (tmp_path / "curriculum.yaml").write_text(yaml.safe_dump(CURRICULUM), encoding="utf-8")
    ((code, out, err),) = pool.run(1, preflight, tmp_path, *LAYOUT)
    assert (code, err) == (2, "")
    verdicts = [line for line in out.splitlines() if line.startswith("verdict: refused: ")]
    assert len(verdicts) == 2
    assert any(
        "domain zh:" in line and "zh_text_document.idx does not exist" in line for line in verdicts
    )
    assert any(
        "domain en-zh:" in line and "enzh_text_document.idx does not exist" in line
        for line in verdicts
    )
    assert "parameters; vocabulary 4,096" in out


def test_a_corpus_that_is_too_short_for_the_curriculum_is_refused(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    capped = CURRICULUM | {
        "domains": {
            name: {**entry, "max_epochs": 1} for name, entry in CURRICULUM["domains"].items()
        }
    }
    for name, entry in capped["domains"].items():
        capped["domains"][name] = entry | {"path": str(sample / entry["path"])}
    (tmp_path / "capped.yaml").write_text(yaml.safe_dump(capped), encoding="utf-8")
    ((code, out, _),) = pool.run(
        1,
        preflight,
        sample,
        *LAYOUT,
        "--curriculum",
        str(tmp_path / "capped.yaml"),
        "--train-iters",
        "10000",
    )
    assert code == 2 and "max_epochs is 1" in out.splitlines()[-1]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_chatflow.__main__ import main\ntry: main(['preflight', "
        "'--help'])\nexcept SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "chatflow preflight" in done.stdout and done.stdout.rstrip().endswith("False")


def test_sizes_that_are_not_positive_are_refused() -> None:
    for words in (["--world-size", "0"], ["--world-size", "8", "--gpu-memory-gib", "-1"]):
        code, _, err = command("preflight", *words)
        assert code == 2 and "give a positive" in err
