"""The reference against Transformer Engine's own Python: a program, because the emulation changes imports for its whole process.

``python -m tests.precision.oracle quick|whole RECIPE ...`` prints one JSON object, {recipe: {layout: {part: what was found}}}; under torchrun's
variables it runs on several ranks, and the first one prints. The models are made by the package itself, once with each implementation.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RECIPES = {
    "delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4 --fp8-amax-compute-algo max --fp8-margin 1",
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
    "bf16": "",
}
WORDS = (
    "--num-layers 3 --hidden-size 128 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --ffn-hidden-size 256 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --seq-length 128 "
    "--micro-batch-size 2 --train-iters 1 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 --bf16"
)
VOCABULARY = 256
TEXT = Path(__file__).parents[2] / "examples" / "quickstart" / "data" / "en.jsonl"


def main(extent: str, recipes: list[str]) -> None:
    """Load the emulation, make the process groups, run what this number of ranks is for, print."""
    warnings.filterwarnings("ignore")
    from megatron_chatflow.engine import cpu, distributed
    from megatron_chatflow.engine.launch import read_launch

    cpu.install()
    import torch

    from tests.precision.emulation import loader

    loader.load((10, 0) if "mxfp8" in recipes else (9, 0))
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    torch.set_num_threads(1)
    launch = read_launch()
    distributed.initialize(launch, settings("", launch.world_size).parallel, 3)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    replace_attention()
    found: dict[str, Any] = {}
    for recipe in recipes:
        for name, layout in {"plain": "", "sequence_parallel": "--sequence-parallel"}.items():
            if not layout or launch.world_size > 1:
                FP8GlobalStateManager.reset()
                config = settings(f"{RECIPES[recipe]} {layout}", launch.world_size)
                chosen = parts(recipe, launch.world_size, extent)
                found.setdefault(recipe, {})[name] = {name: part(config) for name, part in chosen.items()}
    distributed.shut_down()
    if launch.rank == 0:
        print(json.dumps(found))


def settings(words: str, world_size: int) -> Any:
    """Resolved settings of the small model with further flags, tensor parallel over all ranks."""
    from megatron_chatflow.config import make_parser, parse, resolve

    flags = f"{WORDS} --tensor-model-parallel-size {world_size} {words}".split()
    return resolve(parse(make_parser("chatflow train", ""), flags)[0], world_size)


def parts(recipe: str, world_size: int, extent: str) -> dict[str, Callable[[Any], Any]]:
    """What is looked at."""
    found: dict[str, Callable[[Any], Any]] = {}
    if recipe != "bf16":
        found["linear"] = linears
    if world_size > 1:
        return found
    found["keys"] = checkpoint_keys
    if recipe != "bf16":
        found["log"] = contract
    if recipe == "delayed":
        found |= {"histories": histories, "states": exchanged_states, "validation": validation}
    elif recipe != "bf16":
        found["bf16_layers"] = bf16_layers
    if recipe == "tensorwise":
        found["nvidia_reference"] = against_their_reference
    if extent == "whole":
        found |= {"curves": curves, "checkpoints": checkpoints}
    return found


def pair(config: Any, kind: str, bias: bool) -> tuple[Any, Any, Any]:
    """(Transformer Engine's linear layer in megatron-core's wrapper, ours with the same weights, our scope)."""
    import torch
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    from megatron_chatflow.model.gpt import transformer_config
    from megatron_chatflow.precision.linear import ReferenceColumnParallelLinear, ReferenceRowParallelLinear
    from megatron_chatflow.precision.scope import Scope, delayed_scaling

    scope = Scope(config.precision, delayed_scaling(config.precision))
    common = {"init_method": lambda weight: None, "bias": bias, "skip_bias_add": False, "is_expert": False}
    sides = ("gather_output", TEColumnParallelLinear, ReferenceColumnParallelLinear, False)
    if kind == "row":
        sides = ("input_is_parallel", TERowParallelLinear, ReferenceRowParallelLinear, True)
    name, theirs, ours, value = sides
    their = theirs(256, 384, config=transformer_config(config, "transformer_engine"), **common, **{name: value})
    our = ours(256, 384, config=transformer_config(config, "local"), **common, **{name: value}, scope=scope)
    with torch.no_grad():
        our.weight.copy_(torch.randn(our.weight.shape, generator=generator(7)) * 0.05)
        their.weight.copy_(our.weight)
        if bias:
            our.bias.copy_(torch.randn(our.bias.shape, generator=generator(8)))
            their.bias.copy_(our.bias)
    return their, our, scope


def generator(seed: int) -> Any:
    """Random numbers that differ between ranks."""
    import torch

    return torch.Generator().manual_seed(seed * 100 + torch.distributed.get_rank())


def autocast(config: Any) -> Any:
    """Transformer Engine's FP8 region as megatron-core opens it for these settings."""
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_chatflow.model.gpt import transformer_config

    return get_fp8_context(transformer_config(config, "transformer_engine"))


class Stack:
    """Stands for a decoder: a module whose linear layers each get an input of their own."""

    def __new__(cls, linears: list[Any], scope: Any = None) -> Any:
        """A torch module; with a scope, one that is watched by it."""
        import torch

        class Layers(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = torch.nn.ModuleList(linears)

            def forward(self, inputs: list[Any]) -> list[Any]:
                return [layer(x)[0] for layer, x in zip(self.layers, inputs, strict=True)]

        stack = Layers()
        if scope is not None:
            scope.watch(stack)
        return stack


def passes(config: Any, their: Any, our: Any, inputs: list[Any], grads: list[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Forward and backward of both stacks over the same tensors: for each layer ([y, dx, dw, db] of theirs, the same of ours)."""
    results = []
    for layer in their.layers:
        layer.is_first_microbatch = getattr(our.layers[0], "current_microbatch", 0) == 0
    for stack, region in ((their, autocast(config)), (our, None)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if region is None:
            outputs = stack(leaves)
        else:
            with region:
                outputs = stack(leaves)
        for output, grad in reversed(list(zip(outputs, grads, strict=True))):
            output.backward(grad)
        per_layer = []
        for layer, output, leaf in zip(stack.layers, outputs, leaves, strict=True):
            per_layer.append([output.detach(), leaf.grad, *(p.grad.clone() for p in (layer.weight, layer.bias) if p is not None and p.numel())])
            layer.zero_grad()
        results.append(per_layer)
    return zip(*results, strict=True)


def differences(their: list[Any], our: list[Any]) -> list[list[float]]:
    """For y, dx, dw (and db): elements, how many differ, how many by more than one place of bfloat16, the largest difference over the largest value.

    Sums in float32 that cancel are told apart from nothing by 2^-18 of the largest value only; so much is allowed beside the place.
    """
    found = []
    for a, b in zip(their, our, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.double(), b.double()
        far, largest = (a - b).abs(), a.abs().max()
        beyond = far > 2.0**-7 * a.abs().maximum(b.abs()) + 2.0**-18 * largest
        found.append([a.numel(), int((far > 0).sum()), int(beyond.sum()), float(far.max() / largest)])
    return found


def linears(config: Any) -> dict[str, Any]:
    """Column- and row-parallel layers, with and without a bias."""
    import torch

    found = {}
    tp, sp = config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel
    for kind, biases in (("column", (False, True)), ("row", (False,))):  # no row-parallel layer of a model adds its bias itself
        for bias in biases:
            their, our, scope = pair(config, kind, bias)
            inner, outer = (256, 384 // tp) if kind == "column" else (256 // tp, 384)
            tokens_in = 256 // tp if sp and kind == "column" else 256
            tokens_out = 256 // tp if sp and kind == "row" else 256
            whole_in, whole_out = kind == "column" and not sp, kind == "row" and not sp
            x = torch.randn(tokens_in, 2, inner, generator=generator(1)).bfloat16()
            g = (torch.randn(tokens_out, 2, outer, generator=generator(2)) * torch.randn(tokens_out, 1, 1, generator=generator(3)).exp()).bfloat16()
            for tensor, whole in ((x, whole_in), (g, whole_out)):
                if whole and tp > 1:
                    torch.distributed.broadcast(tensor, 0)
            stacks = Stack([their]), Stack([our], scope)
            for _ in range(3):  # scales of delayed scaling are 1 at first
                ((theirs, ours),) = passes(config, *stacks, [x], [g])
            found[kind + (" with bias" if bias else "")] = differences(theirs, ours)
    return found


def contract(config: Any) -> dict[str, Any]:
    """What Transformer Engine does in two micro-batches through one row-parallel layer: quantisations, products, updates, in order."""
    import torch

    from tests.precision.emulation import kernels

    their, _, _ = pair(config, "row", False)
    x, g = torch.randn(256, 2, 256).bfloat16(), torch.randn(256, 2, 384).bfloat16()
    logs = []
    for _ in range(2):
        kernels.LOG.clear()
        leaf = x.clone().requires_grad_()
        with autocast(config):
            y, _ = their(leaf)
        y.backward(g)
        logs.append([[str(word) for word in entry] for entry in kernels.LOG])
    return {"first": logs[0], "second": logs[1], "recipe": type(their.fp8_meta["recipe"]).__mro__[0].__name__}


def models(config: Any) -> tuple[Any, Any]:
    """(the model with Transformer Engine's layers, the model with the portable ones), with equal weights."""
    from megatron_chatflow.model.gpt import build_model

    return tuple(build_model(config, VOCABULARY, impl, wrap=False)[0] for impl in ("transformer_engine", "local"))


def checkpoint_keys(config: Any) -> dict[str, Any]:
    """Names in a checkpoint of either implementation, with norms of queries and keys too; whether the initial weights agree."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    def entries(model: Any) -> dict[str, Any]:
        return {entry.key: entry for entry in model.sharded_state_dict().values() if hasattr(entry, "key")}

    their, our = (entries(model) for model in models(settings(RECIPES[_recipe(config)] + " --qk-layernorm", 1)))
    tensors = [key for key, entry in their.items() if isinstance(entry, ShardedTensor)]
    return {
        "only_one_has": sorted(their.keys() ^ our.keys()),
        "tensors": len(tensors),
        "unequal": [key for key in tensors if not torch.equal(their[key].data, our[key].data)],
    }


def _recipe(config: Any) -> str:
    return config.precision.fp8_recipe if config.precision.fp8_format else "bf16"


def checkpoints(config: Any) -> dict[str, bool]:
    """Trained models of either implementation, written by the package and read into fresh ones of the other and of bfloat16."""
    import tempfile

    import torch

    from megatron_chatflow.model.gpt import build_model
    from megatron_chatflow.training import checkpoint

    their, our = models(config)
    fresh_their, fresh_our = models(config)
    (plain,) = build_model(settings("", 1), VOCABULARY, "local", wrap=False)
    train(their, config, "transformer_engine", 2)
    train(our, config, "local", 2)

    def saved(model: Any) -> list[Any]:
        found = [p for _, p in sorted(model.named_parameters())]
        for layer in model.modules():
            if _recipe(config) == "delayed" and hasattr(layer, "fp8_meta") and "scaling_fwd" in layer.fp8_meta:
                meta = layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"]
                found += [t for m in meta for t in (m.scale, m.amax_history[: config.precision.fp8_amax_history_len])]
            if _recipe(config) == "delayed" and hasattr(layer, "products"):
                found += [layer.products.state()[name] for name in ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")]
        return found

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source, target in (("theirs_to_ours", their, fresh_our), ("ours_to_theirs", our, fresh_their)):
            where = checkpoint.save(Path(folder) / name, 1, [source], None, {})
            checkpoint.load(where, [target], None)
            checkpoint.load(where, [plain], None)
            a, b = (sorted((tuple(t.shape), float(t.double().abs().sum())) for t in saved(model)) for model in (source, target))
            results[name] = a == b
            results[name + "_tensors"] = len(a)
            results["into_bf16_" + name] = torch.equal(plain.module.output_layer.weight, source.module.output_layer.weight)
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
            "tokens": window[:-1].view(b, s), "labels": window[1:].view(b, s), "position_ids": torch.arange(s).expand(b, s),
            "loss_mask": torch.ones(b, s), "segment_ids": segments, "domain": torch.zeros(b, dtype=torch.long),
        })  # fmt: skip
    return found


def train(model: Any, config: Any, impl: str, steps: int) -> list[float]:
    """Losses of AdamW with float32 main weights over the package's own forward step."""
    import torch

    from megatron_chatflow.model.forward import make_forward_step

    step = make_forward_step(1, torch.zeros(VOCABULARY, dtype=torch.long), impl == "transformer_engine")
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
    """Losses of 50 steps: Transformer Engine's layers over packed sequences, the portable ones over a mask, and those in bfloat16."""
    from megatron_chatflow.model.gpt import build_model

    their, our = models(config)
    (plain,) = build_model(settings("", 1), VOCABULARY, "local", wrap=False)
    runs = {"theirs": (their, "transformer_engine"), "ours": (our, "local"), "bf16": (plain, "local")}
    return {name: train(model, config, impl, 50) for name, (model, impl) in runs.items()}


def replace_attention() -> None:
    """Attention of packed sequences [tokens, heads, d] in plain torch: Transformer Engine's kernels for it are not emulated."""
    import torch
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    def forward(self: Any, query: Any, key: Any, value: Any, *arguments: Any, packed_seq_params: Any, **named: Any) -> Any:
        assert packed_seq_params.qkv_format == "thd" and query.dim() == 3
        tokens = len(query)
        document = torch.bucketize(torch.arange(tokens), packed_seq_params.cu_seqlens_q[1:], right=True)
        allowed = (document[:, None] == document[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(tokens, -1)

    TEDotProductAttention.forward = forward


def bf16_layers(config: Any) -> list[str]:
    """Of a model whose first layer and last layer stay in bfloat16: which linear layers Transformer Engine ran in FP8, and which are ours."""
    from megatron_chatflow.config.settings import Config
    from megatron_chatflow.precision.linear import ReferenceColumnParallelLinear, ReferenceRowParallelLinear

    changed: Config = settings(RECIPES[config.precision.fp8_recipe] + " --first-last-layers-bf16", 1)
    their, our = models(changed)
    train(their, changed, "transformer_engine", 1)
    in_fp8 = {name for name, module in their.named_modules() if getattr(module, "fp8", False) and hasattr(module, "weight") and "linear" in name}
    ours = {name for name, module in our.named_modules() if isinstance(module, ReferenceColumnParallelLinear | ReferenceRowParallelLinear)}
    return [sorted(in_fp8), sorted(ours)]


def histories(config: Any) -> dict[str, Any]:
    """20 iterations of two micro-batches through three layers, weights changing in between: scales and histories bit for bit, products too."""
    import torch

    pairs = [pair(config, kind, False) for kind in ("row", "column", "row")]
    scope = pairs[0][2]
    for _, our, own in pairs:  # one decoder: one scope
        our.scope, our.products = scope, our.products if own is scope else scope.products()
    their, our = Stack([p[0] for p in pairs]), Stack([p[1] for p in pairs], scope)
    unequal, worst = [], 0
    for iteration in range(20):
        with torch.no_grad():
            for a, b in zip(their.layers, our.layers, strict=True):
                b.weight.mul_(1 + 0.1 * torch.randn(b.weight.shape, generator=generator(iteration + 50)))
                a.weight.copy_(b.weight)
        for micro_batch in range(2):
            our.layers[0].current_microbatch = micro_batch
            size = 2.0 ** ((iteration * 7 + micro_batch) % 9 - 4)
            inputs = [(torch.randn(64, 2, 256, generator=generator(3 * iteration + i)) * size).bfloat16() for i in range(3)]
            grads = [(torch.randn(64, 2, 384, generator=generator(900 + iteration + i)) / size).bfloat16() for i in range(3)]
            for theirs, ours in passes(config, their, our, inputs, grads):
                worst = max([worst, *(beyond for _, _, beyond, _ in differences(theirs, ours))])
        for i, (a, b) in enumerate(zip(their.layers, our.layers, strict=True)):
            state = b.products.state()
            for direction in ("fwd", "bwd"):
                meta = a.fp8_meta[f"scaling_{direction}"]
                same = torch.equal(meta.scale, state[f"scale_{direction}"]) and torch.equal(meta.amax_history, state[f"amax_history_{direction}"])
                if not same:
                    unequal.append([iteration, i, direction])
    return {"unequal": unequal, "beyond_one_place": worst, "scales": [layer.products.state()["scale_fwd"].tolist() for layer in our.layers]}


def exchanged_states(config: Any) -> dict[str, bool]:
    """A state saved by one implementation, loaded by the other."""
    import torch

    their, our, scope = pair(config, "row", False)
    x, g = torch.randn(64, 2, 256).bfloat16(), torch.randn(64, 2, 384).bfloat16()
    for _ in range(3):
        list(passes(config, Stack([their]), Stack([our], scope), [x], [g]))
    fresh_their, fresh_our, fresh_scope = pair(config, "row", False)
    fresh_their.set_extra_state(our.get_extra_state())
    fresh_our.set_extra_state(their.get_extra_state())
    results = list(passes(config, Stack([fresh_their]), Stack([fresh_our], fresh_scope), [x], [g]))
    again = list(passes(config, Stack([their]), Stack([our], scope), [x], [g]))
    state, meta = fresh_our.products.state(), fresh_their.fp8_meta["scaling_fwd"]
    return {
        "ours_reads_theirs": all(torch.equal(a, b) for a, b in zip(results[0][1], again[0][1], strict=True)),
        "theirs_reads_ours": all(torch.equal(a, b) for a, b in zip(results[0][0], again[0][0], strict=True)),
        "histories": torch.equal(state["amax_history_fwd"], meta.amax_history) and torch.equal(state["scale_fwd"], meta.scale),
    }


def validation(config: Any) -> dict[str, bool]:
    """Whether a pass without gradients leaves something in Transformer Engine's histories, without and with `forget_validation`."""
    import torch

    their, _ = models(config)
    train(their, config, "transformer_engine", 1)
    layer = their.module.decoder.layers[0].mlp.linear_fc2

    def pass_by() -> float:
        from megatron_chatflow.model.forward import make_forward_step

        step = make_forward_step(1, torch.zeros(VOCABULARY, dtype=torch.long), True)
        with torch.no_grad():
            step(iter(batches(config, 1)), their)
        return float(layer.fp8_meta["scaling_fwd"].amax_history[0].abs().max())

    clean = pass_by()
    their.module.decoder._forward_hooks.clear()
    return {"noted_by_itself": pass_by() > 0, "forgotten": clean == 0}


def against_their_reference(config: Any) -> list[int]:
    """Elements of y, dx, dw that differ between the emulated kernels and NVIDIA's own reference of current scaling (over torch._scaled_mm)."""
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import current_scaling_ref_quantizer_factory

    x, g = torch.randn(128, 256).bfloat16(), torch.randn(128, 384).bfloat16()
    layer = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.randn(384, 256))
    results = []
    for kind in (recipe.Float8CurrentScaling(), recipe.CustomRecipe(qfactory=current_scaling_ref_quantizer_factory)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with te.autocast(enabled=True, recipe=kind):
            y = layer(leaf)
        y.backward(g)
        results.append([y.detach(), leaf.grad, layer.weight.grad.clone()])
    return [int((a != b).sum()) for a, b in zip(*results, strict=True)]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
