"""Which stage holds which layers, against megatron-core itself; contradictions are refused by
name.
"""

from __future__ import annotations

import pytest

from megatron_chatflow.config.pipeline_layout import split_layers
from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.errors import ChatflowError
from tests.pool import Pool

CASES = [
    (4, {}),
    (4, {"pipeline_model_parallel_size": 2}),
    (8, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}),
    (8, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 4}),
    (7, {"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 1}),
    (7, {"pipeline_model_parallel_size": 3, "decoder_last_pipeline_num_layers": 3}),
    (
        7,
        {
            "pipeline_model_parallel_size": 4,
            "decoder_first_pipeline_num_layers": 2,
            "decoder_last_pipeline_num_layers": 1,
        },
    ),
    (
        3,
        {
            "pipeline_model_parallel_size": 2,
            "decoder_first_pipeline_num_layers": 2,
            "decoder_last_pipeline_num_layers": 1,
        },
    ),
    (7, {"pipeline_model_parallel_size": 2, "account_for_embedding_in_pipeline_split": True}),
    (11, {"pipeline_model_parallel_size": 4, "account_for_loss_in_pipeline_split": True}),
    (
        2,
        {
            "pipeline_model_parallel_size": 4,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    (
        10,
        {
            "pipeline_model_parallel_size": 3,
            "num_layers_per_virtual_pipeline_stage": 2,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    (7, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|t*5,L"}),
    (9, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E|(tt|)*3tt|tL"}),
    (12, {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "Et*2|(t*3|)*3t|L"}),
]


def _by_megatron(num_layers: int, parallel: ParallelSettings) -> list[list[tuple[int, int]]]:
    """(first layer, number of layers) of each chunk of each stage."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_chatflow.config import Config
    from megatron_chatflow.distributed.fake_ranks import rehearse
    from megatron_chatflow.model.gpt import transformer_config

    config = Config(parallel=parallel).replace(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=2,
        kv_channels=4,
        ffn_hidden_size=32,
    )
    found = []
    for rank in range(parallel.pipeline_model_parallel_size):
        with rehearse(rank, parallel.pipeline_model_parallel_size, parallel, num_layers):
            core = transformer_config(config, "local")
            chunks = (
                range(core.virtual_pipeline_model_parallel_size)
                if core.virtual_pipeline_model_parallel_size
                else [None]
            )
            found.append(
                [
                    (get_transformer_layer_offset(core, c), get_num_layers_to_build(core, c))
                    for c in chunks
                ]
            )
    return found


def _all_by_megatron() -> list[list[list[tuple[int, int]]]]:
    return [
        _by_megatron(num_layers, ParallelSettings(**settings)) for num_layers, settings in CASES
    ]


def test_stages_hold_the_layers_that_megatron_core_gives_them(pool: Pool) -> None:
    (theirs,) = pool.run(1, _all_by_megatron)
    for (num_layers, settings), expected in zip(CASES, theirs, strict=True):
        split = split_layers(ParallelSettings(**settings), num_layers)
        assert [[(chunk.start, len(chunk)) for chunk in stage] for stage in split] == expected, (
            settings
        )
        assert sorted(layer for stage in split for chunk in stage for layer in chunk) == list(
            range(num_layers)
        )


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"decoder_first_pipeline_num_layers": 1, "pipeline_model_parallel_size": 1},
            ["decoder_first_pipeline_num_layers: ", "size 1"],
        ),
        (
            {"account_for_loss_in_pipeline_split": True, "pipeline_model_parallel_size": 1},
            ["account_for_loss_in_pipeline_split: "],
        ),
        (
            {"pipeline_model_parallel_layout": "EttttL", "pipeline_model_parallel_size": 1},
            ["pipeline_model_parallel_layout: "],
        ),
        ({"decoder_first_pipeline_num_layers": 0}, ["decoder_first_pipeline_num_layers: 0"]),
        (
            {"decoder_last_pipeline_num_layers": 4},
            ["num_layers: of 4", "decoder_last_pipeline_num_layers 4"],
        ),
        (
            {"decoder_last_pipeline_num_layers": 5},
            ["num_layers: of 4", "decoder_last_pipeline_num_layers 5"],
        ),
        (
            {"decoder_first_pipeline_num_layers": 1, "pipeline_model_parallel_size": 3},
            ["num_layers: of 4", "leaves 3 for 2"],
        ),
        (
            {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2},
            ["num_layers: of 4", "leaves 1 for 0"],
        ),
        (
            {"decoder_first_pipeline_num_layers": 1, "account_for_loss_in_pipeline_split": True},
            ["decoder_first_pipeline_num_layers: ", "account_for_loss_in_pipeline_split"],
        ),
        (
            {"decoder_last_pipeline_num_layers": 2, "num_layers_per_virtual_pipeline_stage": 1},
            ["decoder_last_pipeline_num_layers: ", "num_layers_per_virtual_pipeline_stage"],
        ),
        (
            {"account_for_loss_in_pipeline_split": True},
            ["num_layers 4 + 1 (account_for_loss_in_pipeline_split)", "size 2"],
        ),
        (
            {"pipeline_model_parallel_layout": "Ett|ttL", "decoder_first_pipeline_num_layers": 2},
            ["layout: ", "decoder_first_pipeline_num_layers"],
        ),
        (
            {
                "pipeline_model_parallel_layout": "Ett|ttL",
                "num_layers_per_virtual_pipeline_stage": 2,
            },
            ["num_layers_per_virtual_pipeline_stage"],
        ),
        (
            {"pipeline_model_parallel_layout": "Ett|t|tL"},
            ["it has 3 stages", "pipeline_model_parallel_size 2"],
        ),
        ({"pipeline_model_parallel_layout": "Ett|tL"}, ["it has 3 layers", "num_layers is 4"]),
        ({"pipeline_model_parallel_layout": "Ett|tt"}, ["the only E", "the only L"]),
        ({"pipeline_model_parallel_layout": "tEt|ttL"}, ["the only E"]),
        ({"pipeline_model_parallel_layout": "Ett|ttm|L|"}, ["it has 'm'"]),
        ({"pipeline_model_parallel_layout": "Ett||tt|L"}, ["stage 1 (from 0) is empty"]),
        ({"pipeline_model_parallel_layout": ""}, ["pipeline_model_parallel_layout: "]),
        ({"pipeline_model_parallel_layout": "E(tt|*2ttL"}, ["it has '('"]),
        ({"pipeline_model_parallel_layout": "E(t*99999)*99999|L"}, ["a million characters"]),
    ],
)
def test_contradictions_are_refused_by_name(settings: dict, parts: list[str]) -> None:
    with pytest.raises(ChatflowError) as error:
        split_layers(ParallelSettings(**({"pipeline_model_parallel_size": 2} | settings)), 4)
    assert all(part in str(error.value) for part in parts), error.value
