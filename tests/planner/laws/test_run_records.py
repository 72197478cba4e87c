"""The records of run directories: N, D and losses as the run itself counts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.config import Config, resolve
from megatron_chatflow.errors import ConfigError, DataError
from megatron_chatflow.planner.laws.run_records import is_annealed, records_of_run
from megatron_chatflow.planner.laws.run_table import read_table, write_table
from megatron_chatflow.planner.parameters import count_parameters, scaling_law_parameters

LLAMA2_7B = {
    "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008,
    "swiglu": True, "add_bias_linear": False, "normalization": "RMSNorm",
    "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True,
}  # fmt: skip
GPT2 = {
    "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_hidden_size": 3072,
    "position_embedding_type": "learned_absolute", "max_position_embeddings": 1024,
}  # fmt: skip


def resolved(**settings: Any) -> Any:
    base = {"seq_length": 1024, "micro_batch_size": 1, "lr": 1e-3, "train_iters": 10}
    return resolve(Config().replace(**{**base, **settings}), 1)


def test_an_untied_input_embedding_is_left_out_and_a_tied_one_counted_once() -> None:
    llama, gpt2 = resolved(**LLAMA2_7B), resolved(**GPT2)
    assert count_parameters(llama, 32000) == 6_738_415_616
    assert scaling_law_parameters(llama, 32000) == 6_738_415_616 - 32000 * 4096
    assert count_parameters(gpt2, 50257) == 124_439_808
    assert scaling_law_parameters(gpt2, 50257) == 124_439_808 - 1024 * 768


def test_a_record_has_what_the_run_counted(reference: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    held_out = lines[-1]["validation"]
    records = {record.language: record for record in records_of_run(reference)}
    assert set(records) == set(held_out) >= {"en", "zh", "en-zh"}
    counts = {name: 0 for name in lines[-2]["domains"]}
    for line in lines:
        for name, values in line.get("domains", {}).items():
            counts[name] += values["samples"]
    for name, record in records.items():
        assert (record.loss, record.bits_per_byte) == (
            held_out[name]["loss"],
            held_out[name]["bits_per_byte"],
        )
        assert record.tokens == 20 * 8 * 64 and record.seed == 1234
        assert record.mixture == {d: count / 160 for d, count in counts.items()}
        assert record.share == counts[name] / 160 and record.kind == "scratch"
        assert record.annealed is True and record.name == "reference"
    layer = 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96 + 2 * 48
    vocab = json.loads((reference / "iter_0000020" / "state.json").read_text())["settings"]
    assert records["en"].params == 4 * layer + 48 + vocab["vocab_size"] * 48
    write_table(tmp_path / "runs.csv", list(records.values()))
    assert read_table(tmp_path / "runs.csv") == list(records.values())


def test_a_run_that_stopped_has_the_record_of_its_last_validation(
    reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(reference, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:17]) + lines[17][:30])
    (record, *_) = records_of_run(run)
    assert record.tokens == 10 * 8 * 64 and record.annealed is False
    (run / "metrics.jsonl").write_text("".join(lines[:5]))
    with pytest.raises(DataError, match="no held-out losses after its first iteration"):
        records_of_run(run)
    for name in ("metrics.jsonl", "config.yaml"):
        (run / name).unlink()
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            records_of_run(run)


def test_a_run_that_began_with_other_weights_is_continued(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "finetuned"
    shutil.copytree(reference, run)
    origin = {"run": "base", "branch": "a", "iteration": 1}
    (run / "lineage.json").write_text(json.dumps({"branch": "b", "weights": origin}))
    assert {record.kind for record in records_of_run(run)} == {"continued"}


SCHEDULES = {
    "cosine": {"lr_decay_style": "cosine"},
    "linear": {"lr_decay_style": "linear", "min_lr": 1e-4},
    "WSD": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5},
    "constant": {"lr_decay_style": "constant"},
    "inverse-square-root": {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 2},
    "flat": {"lr_decay_style": "cosine", "min_lr": 1e-3},
}


@given(
    style=st.sampled_from(sorted(SCHEDULES)),
    batch=st.integers(1, 9),
    samples=st.integers(100, 200),
    iterations=st.integers(1, 200),
)
def test_a_rate_is_annealed_exactly_when_its_decay_is_over(
    style: str, batch: int, samples: int, iterations: int
) -> None:
    config = resolved(
        **GPT2, train_iters=None, train_samples=samples, global_batch_size=batch,
        **SCHEDULES[style],
    )  # fmt: skip
    last = samples // batch
    decays = style in ("cosine", "linear", "WSD")
    assert is_annealed(config, iterations * batch) == (decays and iterations >= last)


def test_the_decay_may_end_later_than_the_run() -> None:
    config = resolved(**GPT2, train_iters=10, lr_decay_iters=20, lr_decay_style="cosine")
    assert not is_annealed(config, 10) and is_annealed(config, 20)
