"""The search: against brute force, and what it must never return."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from megatron_chatflow.config import Config, resolve
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.accelerators import find_accelerator
from megatron_chatflow.planner.layout_search import SEARCHED, search_layouts
from megatron_chatflow.planner.memory import GIB, RESERVE, stage_memory
from megatron_chatflow.planner.parameters import layout_of
from megatron_chatflow.planner.step_settings import step_settings_of
from megatron_chatflow.planner.step_time import predict_step
from tests.planner.measure import LLAMA, VOCAB

H100 = find_accelerator("H100-SXM")
VALUES: dict[str, Any] = LLAMA | {
    "num_layers": 8, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 8,
    "ffn_hidden_size": 5632, "seq_length": 4096, "global_batch_size": 32, "train_iters": 10,
    "lr": 1e-3, "bf16": True, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "use_distributed_optimizer": True,
}  # fmt: skip
CONFIG = Config().replace(**VALUES)


def brute_force(world_size: int, gib: float) -> dict[tuple[Any, ...], float]:
    """{(tp, pp, layers per chunk, micro-batch): seconds} of what resolves and fits."""
    found = {}
    sizes = itertools.product([1, 2, 4, 8], [1, 2, 4, 8], [None, 1, 2, 3, 4], [1, 2, 4, 8, 16])
    for tp, pp, chunk, mbs in sizes:
        if pp == 1 and chunk:
            continue
        settings = {
            "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
            "num_layers_per_virtual_pipeline_stage": chunk, "micro_batch_size": mbs,
            "sequence_parallel": tp > 1,
        }  # fmt: skip
        try:
            config = resolve(CONFIG.replace(**settings), world_size)
        except ConfigError:
            continue
        layout = layout_of(config, world_size)
        if chunk and layout.vpp == 1:
            continue  # one chunk is a stage: the layout without chunks
        memory = max(stage_memory(config, VOCAB, layout, i).total for i in range(pp))
        if memory <= gib * GIB * (1 - RESERVE):
            step = step_settings_of(config, VOCAB, world_size)
            found[tp, pp, chunk, mbs] = predict_step(step, H100).seconds
    return found


@pytest.mark.parametrize(("world_size", "gib"), [(4, 80.0), (8, 10.0)])
def test_the_ranking_is_that_of_all_layouts_that_start_and_fit(world_size: int, gib: float) -> None:
    result = search_layouts(CONFIG, VOCAB, world_size, H100, gib)
    plain = {
        (
            s["tensor_model_parallel_size"],
            s["pipeline_model_parallel_size"],
            s["num_layers_per_virtual_pipeline_stage"],
            s["micro_batch_size"],
        ): layout.time.seconds
        for layout in result.layouts
        if not (s := layout.settings)["recompute_granularity"]
        and not s["account_for_loss_in_pipeline_split"]
    }
    assert plain == brute_force(world_size, gib)
    seconds = [layout.time.seconds for layout in result.layouts]
    assert seconds == sorted(seconds) and len(seconds) <= result.examined


def test_every_ranked_layout_fits_and_starts_with_its_settings() -> None:
    result = search_layouts(CONFIG, VOCAB, 4, H100, 12.0)
    assert result.layouts
    for layout in result.layouts:
        assert set(layout.settings) == set(SEARCHED)
        config = resolve(CONFIG.replace(**layout.settings), 4)
        assert layout.memory_gib <= 12.0 * (1 - RESERVE)
        stages = range(config.parallel.pipeline_model_parallel_size)
        memory = [stage_memory(config, VOCAB, layout_of(config, 4), i).total for i in stages]
        assert layout.memory_gib == pytest.approx(max(memory) / GIB)
        assert config.training.global_batch_size == 32


def test_recomputation_is_slower_and_fits_where_nothing_else_does() -> None:
    result = search_layouts(CONFIG, VOCAB, 1, H100, 80.0)
    best: dict[str | None, float] = {}
    for layout in result.layouts:
        kind = layout.settings["recompute_granularity"]
        best[kind] = min(best.get(kind, 1e9), layout.time.seconds)
    assert best[None] < best["selective"] < best["full"]
    smallest = min(layout.memory_gib for layout in result.layouts)
    tight = search_layouts(CONFIG, VOCAB, 1, H100, smallest / (1 - RESERVE) * 1.01)
    assert {layout.settings["recompute_granularity"] for layout in tight.layouts} == {"full"}


def test_layouts_that_place_layers_by_hand_are_searched_without_it() -> None:
    config = CONFIG.replace(
        pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Ettt|tttttL"
    )
    result = search_layouts(config, VOCAB, 2, H100, 80.0)
    assert result.examined == search_layouts(CONFIG, VOCAB, 2, H100, 80.0).examined


def test_a_search_needs_a_global_batch_and_says_why_nothing_can_start() -> None:
    free = dataclasses.replace(CONFIG).replace(global_batch_size=None)
    with pytest.raises(ConfigError, match="give --global-batch-size N"):
        search_layouts(free, VOCAB, 8, H100, 80.0)
    result = search_layouts(CONFIG.replace(hidden_size=7), VOCAB, 8, H100, 80.0)
    assert (result.layouts, result.examined, result.smallest_gib) == ([], 0, None)
    assert result.refusal is not None and "hidden_size 7" in result.refusal
