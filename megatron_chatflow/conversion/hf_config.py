"""Hugging Face's config.json and this project's model settings, each from the other.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_chatflow.config.schema import ModelSettings
from megatron_chatflow.errors import ConfigError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
"""`model_type` of config.json: the class that runs it. They are one architecture; Qwen2 adds a bias
to the projection of queries, keys and values.
"""

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The constants inside megatron-core's form of LLaMA 3.1's scaling; only its factor is a
setting.
"""

_SIZES = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads")
_SIZES += ("num_hidden_layers", "num_key_value_heads", "head_dim", "sliding_window", "vocab_size")
_NUMBERS = ("rope_theta", "factor", "attention_factor", "partial_rotary_factor", *_LLAMA3)
_TYPES: dict[str, tuple[str, ...]] = {
    "a positive whole number": _SIZES,
    "a whole number": ("max_window_layers",),
    "a positive number": ("rms_norm_eps", "initializer_range", *_NUMBERS),
    "a number": ("attention_dropout",),
    "true or false": ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    "an object": ("rope_scaling", "rope_parameters", "quantization_config"),
    "a list of names": ("layer_types",),
    "a name": ("model_type", "hidden_act", "rope_type", "type", "dtype", "torch_dtype"),
}
_NOT_NULL = ("rope_theta", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "factor")
"""Fields that transformers gives a default where they are missing, and for which it takes no
null.
"""


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    integral = number and isinstance(value, int)
    return {
        "a positive whole number": integral and value > 0,
        "a whole number": integral and value >= 0,
        "a positive number": number and value > 0,
        "a number": number and value >= 0,
        "true or false": isinstance(value, bool),
        "an object": isinstance(value, dict),
        "a list of names": isinstance(value, list) and all(isinstance(v, str) for v in value),
        "a name": isinstance(value, str),
    }[kind]


def _check_types(hf: Mapping[str, Any], where: str) -> None:
    """Refuse a field that is read here and has another type than transformers takes."""
    for kind, keys in _TYPES.items():
        for key in keys:
            if key not in hf or (hf[key] is None and key not in _NOT_NULL):
                continue
            if not _is(hf[key], kind):
                raise ConfigError(f"{where}: {key}: {hf[key]!r} is not {kind}; correct the file")


def model_settings(hf: Mapping[str, Any], where: str) -> tuple[ModelSettings, list[str]]:
    """Return the settings of the model that a config.json describes, and notes for the user.

    Raises ConfigError for an architecture or a feature that has no counterpart here, naming key and
    value; `where` is the file's name.
    """
    _check(hf, where)

    def need(key: str) -> Any:
        if hf.get(key) is None:
            raise ConfigError(
                f"{where}: {key} is missing; take the config.json that belongs to the weights"
            )
        return hf[key]

    heads = need("num_attention_heads")
    groups = (
        (hf.get("num_key_value_heads") or heads)
        if hf["model_type"] == "llama"
        else need("num_key_value_heads")
    )
    longest, notes = need("max_position_embeddings"), []
    window = _sliding_window(hf, need("num_hidden_layers"), where)
    if window is not None and window < longest:
        notes.append(
            f"sliding_window {window}: attention here sees the entire sequence, which is the "
            f"same up to {window} tokens, so "
            f"max_position_embeddings is {window}, not {longest}"
        )
        longest = window
    return ModelSettings(
        num_layers=need("num_hidden_layers"),
        hidden_size=need("hidden_size"),
        num_attention_heads=heads,
        ffn_hidden_size=need("intermediate_size"),
        kv_channels=hf.get("head_dim") or need("hidden_size") // heads,
        group_query_attention=groups < heads,
        num_query_groups=groups if groups < heads else None,
        max_position_embeddings=longest,
        position_embedding_type="rope",
        normalization="RMSNorm",
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=hf["model_type"] == "qwen2",
        untie_embeddings_and_output_weights=not hf.get("tie_word_embeddings", False),
        attention_dropout=hf.get("attention_dropout") or 0.0,
        hidden_dropout=0.0,
        init_method_std=hf.get("initializer_range", 0.02),
        **_rope_settings(hf, where),
    ), notes


def config_json(
    model: ModelSettings, vocab_size: int, dtype: str, template: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        model: its settings, resolved.
        vocab_size: rows of the embedding, padding left out.
        dtype: of the weights, as torch names it, e.g. ``bfloat16``.
        template: the config.json of the model that it was made from, or None. Only what has changed
        since is changed in it.

    Raises:
        ConfigError: the settings are of another architecture.
    """
    fresh = _fresh(model, vocab_size, dtype)
    if template is None:
        return fresh
    found, _ = model_settings(template, "config.json")
    before = _fresh(
        found, template.get("vocab_size"), template.get("dtype") or template.get("torch_dtype")
    )
    # The length of a rotary model is no property of its weights: a run with shorter samples does
    # not make it shorter.
    fresh["max_position_embeddings"] = max(
        fresh["max_position_embeddings"], before["max_position_embeddings"]
    )
    changed = {key: value for key, value in fresh.items() if before[key] != value}
    if "torch_dtype" in changed and "dtype" in template:
        changed["dtype"] = changed.pop("torch_dtype")
    if "rope_parameters" in template and changed.keys() & {"rope_theta", "rope_scaling"}:
        changed["rope_parameters"] = {"rope_theta": fresh["rope_theta"]} | (
            fresh["rope_scaling"] or {"rope_type": "default"}
        )
        changed.pop("rope_theta", None)
        changed.pop("rope_scaling", None)
    return {**template, **changed}


def _fresh(model: ModelSettings, vocab_size: int | None, dtype: str | None) -> dict[str, Any]:
    _check_family(model)
    family = "qwen2" if model.add_qkv_bias else "llama"
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "rope_scaling": _rope_scaling(model),
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _check(hf: Mapping[str, Any], where: str) -> None:
    """Refuse what the settings cannot say."""
    _check_types(hf, where)
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {kind!r} is another architecture; models of the types "
            f"{', '.join(FAMILIES)} can be converted"
        )
    rotated = hf.get(
        "partial_rotary_factor", (hf.get("rope_parameters") or {}).get("partial_rotary_factor")
    )
    for key, value, usual, reason in (
        (
            "quantization_config",
            hf.get("quantization_config"),
            (None,),
            "quantised weights cannot be converted, take the unquantised ones",
        ),
        (
            "hidden_act",
            hf.get("hidden_act"),
            (None, "silu"),
            "only SiLU-gated feed-forward layers can be converted",
        ),
        (
            "attention_bias",
            hf.get("attention_bias"),
            (None, False),
            "a bias in the output projection of attention alone is no setting of Megatron",
        ),
        (
            "mlp_bias",
            hf.get("mlp_bias"),
            (None, False),
            "a bias in the feed-forward layer alone is no setting of Megatron",
        ),
        (
            "partial_rotary_factor",
            rotated,
            (None, 1, 1.0),
            "only heads that are rotated completely can be converted",
        ),
    ):
        if value not in usual:
            raise ConfigError(f"{where}: {key} is {value!r}; {reason}")


def _sliding_window(hf: Mapping[str, Any], layers: int, where: str) -> int | None:
    """Tokens that attention looks back in the layers that look back least, or None for all.

    Where the file is silent, transformers' own defaults hold. Qwen2 has the window in the layers
    that `layer_types` names, or in those from number `max_window_layers` on: in none where that is
    the number of layers.
    """
    if hf["model_type"] == "mistral":
        return hf.get("sliding_window", 4096)
    if hf["model_type"] != "qwen2" or not hf.get("use_sliding_window"):
        return None
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        return hf.get("sliding_window", 4096) if (first or 0) < layers else None
    if len(kinds) != layers or not {"full_attention", "sliding_attention"}.issuperset(kinds):
        raise ConfigError(
            f"{where}: layer_types: {kinds} is not full_attention or sliding_attention for each of "
            f"{layers} layers; correct the file"
        )
    return hf.get("sliding_window", 4096) if "sliding_attention" in kinds else None


def _rope_settings(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the rotary settings of `rope_theta` and `rope_scaling`, or of `rope_parameters`.

    The latter holds both since transformers 5.
    """
    rope = (
        {"rope_theta": hf.get("rope_theta", 10000.0)}
        | (hf.get("rope_scaling") or {})
        | (hf.get("rope_parameters") or {})
    )
    for key, value in rope.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"{where}: rope_parameters: {key} has separate rotary positions, and all layers "
                "share theirs here; it cannot be converted"
            )
    _check_types(rope, where)
    kind, theta = rope.get("rope_type", rope.get("type", "default")), rope["rope_theta"]
    if kind in ("linear", "llama3") and "factor" not in rope:
        raise ConfigError(
            f"{where}: factor: rope scaling of type {kind!r} needs it; correct the file"
        )
    if theta != int(theta):
        raise ConfigError(
            f"{where}: rope_theta is {theta}; Megatron's --rotary-base is a whole number, "
            f"so it cannot be converted"
        )
    base = {"rotary_base": int(theta)}
    if kind == "default":
        return base
    if kind == "linear":
        return base | {"rotary_seq_len_interpolation_factor": float(rope["factor"])}
    if kind != "llama3":
        raise ConfigError(
            f"{where}: rope scaling of type {kind!r} is not in megatron-core's GPT; "
            f"default, linear and llama3 can be converted"
        )
    for key, value in _LLAMA3.items():
        if rope.get(key, value) != value:
            raise ConfigError(
                f"{where}: {key} of the llama3 rope scaling is {rope[key]}; megatron-core "
                f"has it fixed at {value}"
            )
    return base | {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}


def _rope_scaling(model: ModelSettings) -> dict[str, Any] | None:
    if model.use_rope_scaling:
        return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3}
    if model.rotary_seq_len_interpolation_factor is not None:
        return {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
    return None


def _check_family(model: ModelSettings) -> None:
    """Refuse settings that no family above has."""
    for name, wanted in (
        ("position_embedding_type", "rope"),
        ("normalization", "RMSNorm"),
        ("swiglu", True),
        ("add_bias_linear", False),
        ("qk_layernorm", False),
        ("rotary_percent", 1.0),
    ):
        if getattr(model, name) != wanted:
            raise ConfigError(
                f"{name} is {getattr(model, name)}: the model is of another architecture "
                f"than LLaMA, Mistral and Qwen2, where it is {wanted}, so it "
                "cannot become a Hugging Face folder of these types"
            )
    if model.use_rope_scaling and model.rotary_seq_len_interpolation_factor is not None:
        raise ConfigError(
            "use_rope_scaling and rotary_seq_len_interpolation_factor are both given; "
            "Hugging Face's config.json can tell one of them"
        )
