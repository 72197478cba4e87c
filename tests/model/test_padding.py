"""The rows that pad the vocabulary change no loss, no gradient and no initial weight."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Pool

VOCABULARY = 101
LAYERS, HEADS = 2, 6
WORDS = (
    f"--num-layers {LAYERS} --hidden-size 48 --num-attention-heads {HEADS} "
    f"--ffn-hidden-size 96 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--seq-length 16 --attention-dropout 0 --hidden-dropout 0 --train-iters 1 --lr 1e-3 "
    "--init-method-std 0.3"
)
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def _run(*words: str) -> tuple[list[float], dict[str, Any], dict[str, Any], list[float]]:
    """Losses; this rank's shard and its gradient for each parameter; all logits of the last
    position.
    """
    import torch

    from megatron_chatflow.config import make_parser, parse, resolve
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.model.gpt import build_model

    launch = read_launch()
    config = resolve(
        parse(make_parser("chatflow train", ""), [*WORDS.split(), *words])[0], launch.world_size
    )
    process_groups.initialize(launch, config.parallel, LAYERS)
    try:
        (model,) = build_model(config, VOCABULARY, "local", wrap=False)
        tokens, labels = _batch()
        positions = torch.arange(16).expand(2, -1)
        losses = model(tokens, positions, None, labels=labels)
        losses.float().mean().backward()
        with torch.no_grad():
            logits = (
                model(tokens, positions, None, runtime_gather_output=True)[0, -1].float().tolist()
            )
        parameters = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        return (
            losses.flatten().tolist(),
            {name: p.detach().float().numpy().copy() for name, p in parameters.items()},
            {
                name: p.grad.float().numpy().copy()
                for name, p in parameters.items()
                if name in TABLES
            },
            logits,
        )
    finally:
        process_groups.shut_down()


def _batch() -> Any:
    import torch

    tokens = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _huggingface(weights: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Losses and gradients of the two tables by transformers, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_chatflow.conversion.weight_mapping import huggingface_names, split

    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
    model = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=1e-5, tie_word_embeddings=True))
    state = {}
    for name, value in weights.items():
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        key = ".".join(part for part in name.split(".") if not part.isdigit())
        for old, new in (
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            # fmt: skip
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ):
            key = key.replace(old, new)
        state |= zip(
            huggingface_names(key, layer),
            split(key, torch.from_numpy(value), HEADS, 1),
            strict=True,
        )
    model.load_state_dict(state, strict=False)
    tokens, labels = _batch()
    losses = torch.nn.functional.cross_entropy(
        model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    losses.mean().backward()
    return losses.tolist(), {TABLES[0]: model.model.embed_tokens.weight.grad.numpy()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_losses_gradients_and_initial_weights_do_not_depend_on_the_padding(
    pool: Pool, world: int
) -> None:
    import numpy as np

    ((unpadded, weights, _, _),) = pool.run(1, _run, "--make-vocab-size-divisible-by", "1")
    expected, gradients = _huggingface(weights)
    assert np.allclose(unpadded, expected, rtol=1e-5)
    for multiple, rows in (
        ("1", -(-VOCABULARY // world) * world),
        ("64", 192 if world == 3 else 128),
        ("128", 384 if world == 3 else 128),
    ):
        ranks = pool.run(
            world,
            _run,
            "--make-vocab-size-divisible-by",
            multiple,
            "--tensor-model-parallel-size",
            str(world),
        )
        for losses, _, _, logits in ranks:
            assert np.allclose(losses, expected, rtol=1e-5)
            assert (
                len(logits) == rows
                and max(logits[VOCABULARY:], default=-1e38) <= -1e38
                and min(logits[:VOCABULARY]) > -1e3
            )
        if world == 1 and multiple != "1":
            assert ranks[0][0] == pytest.approx(unpadded, rel=1e-6)
        (name,) = gradients
        table, gradient = (np.concatenate([rank[i][name] for rank in ranks]) for i in (1, 2))
        assert len(table) == rows
        assert np.array_equal(table[:VOCABULARY], weights[name]) and not table[VOCABULARY:].any()
        # By norm: single elements depend on the CPU's order of addition, sums of up to 200 terms
        # are off by 200 x 2^-24 = 1.2e-5 of the norm.
        error = np.linalg.norm(gradient[:VOCABULARY] - gradients[name])
        assert error <= 1.2e-5 * np.linalg.norm(gradients[name]) and not gradient[VOCABULARY:].any()


def test_bf16_masks_the_padding_too(pool: Pool) -> None:
    import numpy as np

    (((losses, _, gradients, _)),) = pool.run(
        1, _run, "--bf16", "--make-vocab-size-divisible-by", "128"
    )
    ((plain, _, _, _),) = pool.run(1, _run, "--bf16", "--make-vocab-size-divisible-by", "1")
    assert np.allclose(losses, plain, rtol=1e-5)
    assert not gradients[TABLES[0]][VOCABULARY:].any()
