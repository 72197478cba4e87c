"""The layouts of weights, and config.json."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.conversion.hf_config import config_json, model_settings
from megatron_chatflow.conversion.weight_mapping import (
    LAYERS,
    huggingface_names,
    join,
    split,
    split_shapes,
)
from megatron_chatflow.errors import ChatflowError

QKV = LAYERS + "self_attention.linear_qkv.weight"
FC1 = LAYERS + "mlp.linear_fc1.weight"
BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "vocab_size": 100, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip


@settings(deadline=None)
@given(
    groups=st.integers(1, 5),
    queries=st.integers(1, 4),
    head=st.integers(1, 4),
    width=st.integers(1, 3),
    bias=st.booleans(),
)
def test_queries_keys_and_values_are_parted_as_they_were_joined(
    groups: int, queries: int, head: int, width: int, bias: bool
) -> None:
    tail = () if bias else (width,)
    sizes = [groups * queries * head, groups * head, groups * head]
    parts = [torch.randn(size, *tail) for size in sizes]
    joined = join(QKV, parts, groups)
    for part, again in zip(parts, split(QKV, joined, groups, queries), strict=True):
        assert part.equal(again)
    assert split_shapes(QKV, tuple(joined.shape), groups, queries) == [
        tuple(part.shape) for part in parts
    ]


def test_a_group_holds_its_queries_then_its_key_then_its_value() -> None:
    """Two groups of two queries, heads of one row, numbered by hand."""
    q, k, v = (
        torch.tensor([[0.0], [1], [2], [3]]),
        torch.tensor([[10.0], [11]]),
        torch.tensor([[20.0], [21]]),
    )
    assert join(QKV, [q, k, v], 2).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_the_gate_is_above_the_up_projection() -> None:
    assert huggingface_names(FC1, 3) == (
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    )
    assert join(FC1, [torch.zeros(2, 1), torch.ones(2, 1)], 1).flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "llama3", "factor": 32.0}, {"type": "linear", "factor": 2.0}]
)
def test_a_config_is_kept_as_it_was_where_nothing_changed(kind: str, scaling: dict | None) -> None:
    template = BASE | {
        "model_type": kind,
        "rope_scaling": scaling,
        "sliding_window": None,
        "something_else": [1, 2],
    }
    read, notes = model_settings(template, "config.json")
    assert notes == []
    assert config_json(read, 100, "bfloat16", template) == template


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "heads": st.sampled_from([2, 4]),
            "scaled": st.booleans(),
            "bias": st.booleans(),
            "untied": st.booleans(),
        }
    )
)
def test_a_config_without_a_pattern_gives_the_same_settings(case: dict) -> None:
    read, _ = model_settings(BASE | {"num_key_value_heads": case["heads"]}, "config.json")
    read = dataclasses.replace(
        read,
        use_rope_scaling=case["scaled"],
        add_qkv_bias=case["bias"],
        untie_embeddings_and_output_weights=case["untied"],
    )
    assert model_settings(config_json(read, 100, "float32", None), "config.json")[0] == read


def test_what_the_run_changed_is_changed_in_the_config_and_nothing_else() -> None:
    new_style = {
        key: value for key, value in BASE.items() if key not in ("rope_theta", "torch_dtype")
    }
    new_style |= {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    read, _ = model_settings(new_style, "config.json")
    read = dataclasses.replace(
        read, rotary_base=500000, max_position_embeddings=16, norm_epsilon=1e-5
    )
    written = config_json(read, 120, "float32", new_style)
    changed = {key: value for key, value in written.items() if new_style.get(key) != value}
    assert changed == {
        "vocab_size": 120, "dtype": "float32", "rms_norm_eps": 1e-5, "rope_parameters":
            {"rope_type": "default", "rope_theta": 500000.0},
    }  # fmt: skip
    assert written.keys() == new_style.keys()


def test_a_sliding_window_shortens_the_longest_sequence_and_is_reported() -> None:
    read, (note,) = model_settings(
        BASE | {"model_type": "mistral", "sliding_window": 1024}, "config.json"
    )
    assert read.max_position_embeddings == 1024 and "sliding_window 1024" in note
    silent, (note,) = model_settings(
        BASE | {"model_type": "mistral", "max_position_embeddings": 32768}, "config.json"
    )
    assert silent.max_position_embeddings == 4096 and "sliding_window 4096" in note


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is another architecture"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "rope_type": "default",
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor is 0.5",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "low_freq_factor of the llama3 rope scaling is 2.0",
        ),
        ({"rope_theta": 10000.5}, "rope_theta is 10000.5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"model_type": "qwen2", "num_key_value_heads": None}, "num_key_value_heads is missing"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_its_name(change: dict, named: str) -> None:
    with pytest.raises(ChatflowError, match="config.json: ") as error:
        model_settings(BASE | change, "config.json")
    assert named in str(error.value)


WRONG = {
    "rope_theta": ["10000.0", None, [1], float("inf"), True, -1],
    "hidden_size": ["48", 48.5, True, [48], -48],
    "num_attention_heads": ["4", 0],
    "num_key_value_heads": ["2", {}],
    "num_hidden_layers": ["2", 2.5],
    "intermediate_size": ["96"],
    "head_dim": ["12", 12.5],
    "vocab_size": ["100"],
    "max_position_embeddings": ["4096", 1e4],
    "rms_norm_eps": ["1e-5", None, float("nan")],
    "initializer_range": ["0.02", None],
    "attention_dropout": ["0.0", True],
    "tie_word_embeddings": ["false", 0, None],
    "attention_bias": ["false"],
    "mlp_bias": [[]],
    "partial_rotary_factor": ["1.0"],
    "rope_scaling": ["linear", [], 8],
    "rope_parameters": ["default"],
    "model_type": [["llama"], 1],
    "hidden_act": [["silu"]],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_field_of_a_wrong_type_is_refused_by_name(key: str) -> None:
    for value in WRONG[key]:
        with pytest.raises(ChatflowError, match=f"^config.json: {key}: "):
            model_settings(BASE | {key: value}, "config.json")


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "llama3", "factor": "8.0"}, "factor"),
        ({"rope_type": "linear", "factor": None}, "factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": ["default"]}, "rope_type"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "1"}, "low_freq_factor"),
        ({"rope_type": "default", "rope_theta": "1e4"}, "rope_theta"),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters"),
    ],
)
def test_a_rotary_field_of_a_wrong_type_is_refused_by_name(
    section: str, rope: dict, named: str
) -> None:
    with pytest.raises(ChatflowError, match=f"^config.json: {named}: "):
        model_settings(BASE | {section: rope}, "config.json")


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        ({"max_window_layers": 2}, 8192),
        ({"max_window_layers": 28}, 8192),
        ({}, 8192),
        ({"max_window_layers": 1}, 1024),
        ({"max_window_layers": 0}, 1024),
        ({"max_window_layers": 1, "use_sliding_window": False}, 8192),
        ({"max_window_layers": 0, "sliding_window": None}, 8192),
        ({"max_window_layers": 0, "layer_types": ["full_attention"] * 2}, 8192),
        ({"max_window_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}, 1024),
    ],
)
def test_qwen2_has_its_length_cut_only_where_a_layer_has_the_window(
    change: dict, longest: int
) -> None:
    from transformers import Qwen2Config

    window = {"use_sliding_window": True, "sliding_window": 1024, "max_position_embeddings": 8192}
    content = BASE | {"model_type": "qwen2", "num_hidden_layers": 2} | window | change
    theirs = Qwen2Config(**content)
    assert ("sliding_attention" in theirs.layer_types and theirs.sliding_window is not None) == (
        longest == 1024
    )
    read, notes = model_settings(content, "config.json")
    assert read.max_position_embeddings == longest and len(notes) == (longest == 1024)


@pytest.mark.parametrize(
    "kinds", [["full_attention"], ["full_attention", "linear_attention"], "full", [1, 2]]
)
def test_layer_types_that_do_not_fit_the_layers_are_refused(kinds: object) -> None:
    content = BASE | {
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "use_sliding_window": True,
        "layer_types": kinds,
    }
    with pytest.raises(ChatflowError, match=r"^config.json: layer_types: "):
        model_settings(content, "config.json")
