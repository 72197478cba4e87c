"""Activation recomputation: what its four settings must say together."""

from __future__ import annotations

from megatron_chatflow.config.pipeline_layout import chunk_sizes
from megatron_chatflow.config.schema import Config
from megatron_chatflow.errors import ConfigError

MODULES = ("core_attn", "mlp", "layernorm")
"""Parts of a layer that can be computed again."""


def check_recompute(config: Config) -> None:
    """Refuse what has no effect or no meaning. The layout is checked already. Raises ConfigError
    with the settings' names and the cure.
    """
    t = config.training
    if t.recompute_granularity is None:
        for name in ("recompute_method", "recompute_num_layers", "recompute_modules"):
            if getattr(t, name) is not None:
                raise ConfigError(
                    f"{name} has no effect without recompute_granularity; add "
                    f"--recompute-granularity full or selective, or drop it"
                )
    elif t.recompute_granularity == "full":
        _check_full(config)
    else:
        _check_selective(config)


def _check_full(config: Config) -> None:
    t, sizes = config.training, chunk_sizes(config.parallel, config.model.num_layers)
    layers = max(sizes)
    if t.recompute_modules is not None:
        raise ConfigError(
            "recompute_modules belongs to recompute_granularity selective; drop "
            "--recompute-modules or write selective"
        )
    if t.recompute_method is None or t.recompute_num_layers is None:
        raise ConfigError(
            "recompute_granularity full needs recompute_method and recompute_num_layers; "
            "add --recompute-method uniform --recompute-num-layers 1"
        )
    if not 1 <= t.recompute_num_layers <= layers:
        raise ConfigError(
            f"recompute_num_layers is {t.recompute_num_layers}, and a model chunk has "
            f"{layers} layers; give a number from 1 to {layers}"
        )
    layers = next((size for size in sorted(sizes) if size % t.recompute_num_layers), None)
    if t.recompute_method == "uniform" and layers is not None:
        raise ConfigError(
            f"{layers} layers of a model chunk are not a multiple of recompute_num_layers "
            f"{t.recompute_num_layers}, which recompute_method uniform "
            "needs; change it or write --recompute-method block"
        )


def _check_selective(config: Config) -> None:
    t = config.training
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(t, name) is not None:
            raise ConfigError(
                f"{name} belongs to recompute_granularity full; drop "
                f"--{name.replace('_', '-')} or write full"
            )
    t.recompute_modules = t.recompute_modules or ["core_attn"]
    for name in t.recompute_modules:
        if name not in MODULES:
            raise ConfigError(
                f"recompute_modules has {name!r}; the parts of a layer are {', '.join(MODULES)}"
            )
    p = config.precision
    if (
        "layernorm" in t.recompute_modules
        and p.fp8_format is not None
        and p.fp8_recipe == "delayed"
    ):
        raise ConfigError(
            "recompute_modules layernorm does not go with fp8_recipe delayed, whose "
            "products keep FP8 copies of the norm; drop layernorm or choose "
            "another --fp8-recipe"
        )
