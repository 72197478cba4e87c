"""The small model that is held against Transformer Engine, as settings."""

from __future__ import annotations

from typing import Any

RECIPES = {
    "delayed": (
        "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4 "
        "--fp8-amax-compute-algo max --fp8-margin 1"
    ),
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
    "bf16": "",
}
WORDS = (
    "--num-layers 3 --hidden-size 128 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --ffn-hidden-size 256 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --seq-length 128 "
    "--micro-batch-size 2 --train-iters 1 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 --bf16"
)


def settings(words: str, world_size: int) -> Any:
    """Resolved settings of the small model with further flags, tensor parallel over all ranks."""
    from megatron_chatflow.config import make_parser, parse, resolve

    flags = f"{WORDS} --tensor-model-parallel-size {world_size} {words}".split()
    return resolve(parse(make_parser("chatflow train", ""), flags)[0], world_size)


def recipe_of(config: Any) -> str:
    return config.precision.fp8_recipe if config.precision.fp8_format else "bf16"
