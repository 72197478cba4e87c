"""Models compared with those of Transformer Engine's layers: names, checkpoints, losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fp8.oracle.settings import RECIPES, recipe_of, settings

VOCABULARY = 256
TEXT = Path(__file__).parents[3] / "examples" / "quickstart" / "data" / "en.jsonl"


def models(config: Any) -> tuple[Any, Any]:
    """Return the models with Transformer Engine's and with the portable layers, equal weights."""
    from megatron_chatflow.model.gpt import build_model

    return tuple(
        build_model(config, VOCABULARY, impl, wrap=False)[0]
        for impl in ("transformer_engine", "local")
    )


def checkpoint_keys(config: Any) -> dict[str, Any]:
    """Compare names in a checkpoint (norms of queries and keys too) and initial weights."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    def entries(model: Any) -> dict[str, Any]:
        return {
            entry.key: entry
            for entry in model.sharded_state_dict().values()
            if hasattr(entry, "key")
        }

    their, our = (
        entries(model)
        for model in models(settings(RECIPES[recipe_of(config)] + " --qk-layernorm", 1))
    )
    tensors = [key for key, entry in their.items() if isinstance(entry, ShardedTensor)]
    return {
        "only_one_has": sorted(their.keys() ^ our.keys()),
        "tensors": len(tensors),
        "unequal": [key for key in tensors if not torch.equal(their[key].data, our[key].data)],
    }


def checkpoints(config: Any) -> dict[str, bool]:
    """Train each implementation, save, and load into new models of the other and in bfloat16."""
    import tempfile

    import torch

    from megatron_chatflow.checkpoint import state_dict
    from megatron_chatflow.model.gpt import build_model

    their, our = models(config)
    fresh_their, fresh_our = models(config)
    (plain,) = build_model(settings("", 1), VOCABULARY, "local", wrap=False)
    train(their, config, "transformer_engine", 2)
    train(our, config, "local", 2)

    def saved(model: Any) -> list[Any]:
        found = [p for _, p in sorted(model.named_parameters())]
        for layer in model.modules():
            if (
                recipe_of(config) == "delayed"
                and hasattr(layer, "fp8_meta")
                and "scaling_fwd" in layer.fp8_meta
            ):
                meta = layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"]
                found += [
                    t
                    for m in meta
                    for t in (m.scale, m.amax_history[: config.precision.fp8_amax_history_len])
                ]
            if recipe_of(config) == "delayed" and hasattr(layer, "products"):
                found += [
                    layer.products.state()[name]
                    for name in ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
                ]
        return found

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source, target in (
            ("theirs_to_ours", their, fresh_our),
            ("ours_to_theirs", our, fresh_their),
        ):
            where = state_dict.save(Path(folder) / name, 1, [source], None, {})
            state_dict.load(where, [target], None)
            state_dict.load(where, [plain], None)
            a, b = (
                sorted((tuple(t.shape), float(t.double().abs().sum())) for t in saved(model))
                for model in (source, target)
            )
            results[name] = a == b
            results[name + "_tensors"] = len(a)
            results["into_bf16_" + name] = torch.equal(
                plain.module.output_layer.weight, source.module.output_layer.weight
            )
    return results


def batches(config: Any, steps: int) -> list[dict[str, Any]]:
    """Micro-batches of real text as bytes, each window cut into documents."""
    import numpy as np
    import torch

    text = torch.tensor(np.frombuffer(TEXT.read_bytes(), np.uint8).astype(np.int64))
    b, s = config.training.micro_batch_size, config.data.seq_length
    found = []
    for step in range(steps):
        window = text[step * b * s : (step + 1) * b * s + 1]
        segments = torch.zeros(b, s, dtype=torch.long)
        segments[0, 40:] = 1
        segments[0, 41:] = 2
        found.append({
            "tokens": window[:-1].view(b, s), "labels": window[1:].view(b, s), "position_ids":
                torch.arange(s).expand(b, s),
            "loss_mask": torch.ones(b, s), "segment_ids": segments, "domain": torch.zeros(b,
            dtype=torch.long),
        })  # fmt: skip
    return found


def train(model: Any, config: Any, impl: str, steps: int) -> list[float]:
    """Losses of AdamW with float32 main weights over the package's own forward step."""
    import torch

    from megatron_chatflow.model.forward import make_forward_step
    from megatron_chatflow.tokenizer import TokenBytes

    step = make_forward_step(
        1, TokenBytes.of(None, VOCABULARY), impl == "transformer_engine", torch.device("cpu")
    )
    main = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(main, 3e-4)
    losses = []
    for batch in batches(config, steps):
        model.set_is_first_microbatch()
        output, loss_function = step(iter([batch]), model)
        total, count, _ = loss_function(output)
        loss = total / count
        model.zero_grad()
        loss.backward()
        for own, p in zip(main, model.parameters(), strict=True):
            own.grad = p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for own, p in zip(main, model.parameters(), strict=True):
                p.copy_(own)
        losses.append(float(loss))
    return losses


def curves(config: Any) -> dict[str, list[float]]:
    """Return the losses of 50 steps.

    Transformer Engine's layers take packed sequences; the portable ones take a mask, in FP8 and
    in bfloat16.
    """
    from megatron_chatflow.model.gpt import build_model

    their, our = models(config)
    (plain,) = build_model(settings("", 1), VOCABULARY, "local", wrap=False)
    runs = {
        "theirs": (their, "transformer_engine"),
        "ours": (our, "local"),
        "bf16": (plain, "local"),
    }
    return {name: train(model, config, impl, 50) for name, (model, impl) in runs.items()}


def replace_attention() -> None:
    """Replace attention of packed sequences [tokens, heads, d] by plain torch: not emulated."""
    import torch
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    def forward(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        *arguments: Any,
        packed_seq_params: Any,
        **named: Any,
    ) -> Any:
        assert packed_seq_params.qkv_format == "thd" and query.dim() == 3
        tokens = len(query)
        document = torch.bucketize(
            torch.arange(tokens), packed_seq_params.cu_seqlens_q[1:], right=True
        )
        allowed = (document[:, None] == document[None]) & torch.ones(
            tokens, tokens, dtype=torch.bool
        ).tril()
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, enable_gqa=True
        )
        return out[0].transpose(0, 1).reshape(tokens, -1)

    TEDotProductAttention.forward = forward


def bf16_layers(config: Any) -> list[str]:
    """Return the FP8 linear layers of Transformer Engine and ours; first and last stay bfloat16."""
    from megatron_chatflow.config.schema import Config
    from megatron_chatflow.fp8.linear import (
        ReferenceColumnParallelLinear,
        ReferenceRowParallelLinear,
    )

    changed: Config = settings(
        RECIPES[config.precision.fp8_recipe] + " --first-last-layers-bf16", 1
    )
    their, our = models(changed)
    train(their, changed, "transformer_engine", 1)
    in_fp8 = {
        name
        for name, module in their.named_modules()
        if getattr(module, "fp8", False) and hasattr(module, "weight") and "linear" in name
    }
    ours = {
        name
        for name, module in our.named_modules()
        if isinstance(module, ReferenceColumnParallelLinear | ReferenceRowParallelLinear)
    }
    return [sorted(in_fp8), sorted(ours)]


def validation(config: Any) -> dict[str, bool]:
    """Return whether a pass without gradients changes Transformer Engine's histories.

    Once without `forget_validation` ("noted") and once with it ("forgotten").
    """
    import torch

    their, _ = models(config)
    train(their, config, "transformer_engine", 1)
    layer = their.module.decoder.layers[0].mlp.linear_fc2

    def pass_by() -> float:
        from megatron_chatflow.model.forward import make_forward_step
        from megatron_chatflow.tokenizer import TokenBytes

        step = make_forward_step(1, TokenBytes.of(None, VOCABULARY), True, torch.device("cpu"))
        with torch.no_grad():
            step(iter(batches(config, 1)), their)
        return float(layer.fp8_meta["scaling_fwd"].amax_history[0].abs().max())

    clean = pass_by()
    their.module.decoder._forward_hooks.clear()
    return {"noted": pass_by() > 0, "forgotten": clean == 0}
