"""Linear layers and their FP8 state compared with Transformer Engine's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def pair(config: Any, kind: str, bias: bool) -> tuple[Any, Any, Any]:
    """Return (Transformer Engine's wrapped linear layer, ours with its weights, our context)."""
    import torch
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
    )

    from megatron_chatflow.fp8.context import Fp8Context, delayed_scaling
    from megatron_chatflow.fp8.linear import (
        ReferenceColumnParallelLinear,
        ReferenceRowParallelLinear,
    )
    from megatron_chatflow.model.gpt import transformer_config

    fp8_context = Fp8Context(config.precision, delayed_scaling(config.precision))
    common = {
        "init_method": lambda weight: None,
        "bias": bias,
        "skip_bias_add": False,
        "is_expert": False,
    }
    sides = ("gather_output", TEColumnParallelLinear, ReferenceColumnParallelLinear, False)
    if kind == "row":
        sides = ("input_is_parallel", TERowParallelLinear, ReferenceRowParallelLinear, True)
    name, theirs, ours, value = sides
    their = theirs(
        256, 384, config=transformer_config(config, "transformer_engine"), **common, **{name: value}
    )
    our = ours(
        256,
        384,
        config=transformer_config(config, "local"),
        **common,
        **{name: value},
        fp8_context=fp8_context,
    )
    with torch.no_grad():
        our.weight.copy_(torch.randn(our.weight.shape, generator=generator(7)) * 0.05)
        their.weight.copy_(our.weight)
        if bias:
            our.bias.copy_(torch.randn(our.bias.shape, generator=generator(8)))
            their.bias.copy_(our.bias)
    return their, our, fp8_context


def generator(seed: int) -> Any:
    """Return a generator whose numbers differ between ranks."""
    import torch

    return torch.Generator().manual_seed(seed * 100 + torch.distributed.get_rank())


def autocast(config: Any) -> Any:
    """Return Transformer Engine's FP8 region as megatron-core opens it for these settings."""
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_chatflow.model.gpt import transformer_config

    return get_fp8_context(transformer_config(config, "transformer_engine"))


class Stack:
    """A minimal decoder: a module whose linear layers each get a separate input."""

    def __new__(cls, linears: list[Any], fp8_context: Any = None) -> Any:
        """Build the torch module; an `fp8_context`, if given, watches it."""
        import torch

        class Layers(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = torch.nn.ModuleList(linears)

            def forward(self, inputs: list[Any]) -> list[Any]:
                return [layer(x)[0] for layer, x in zip(self.layers, inputs, strict=True)]

        stack = Layers()
        if fp8_context is not None:
            fp8_context.watch(stack)
        return stack


Tensors = list[Any]


def passes(
    config: Any, their: Any, our: Any, inputs: list[Any], grads: list[Any]
) -> Iterator[tuple[Tensors, Tensors, list[tuple[Any, Any]]]]:
    """Run forward and backward of both stacks over the same tensors.

    Yield for each layer [y, dx, dw, db] of theirs, the same of ours, and (lowest, highest) of each.
    """
    from tests.fp8.emulation import kernels

    results = []
    for layer in their.layers:
        layer.is_first_microbatch = getattr(our.layers[0], "current_microbatch", 0) == 0
    kernels.BOUNDS.clear()
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
            per_layer.append(
                [
                    output.detach(),
                    leaf.grad,
                    *(
                        p.grad.clone()
                        for p in (layer.weight, layer.bias)
                        if p is not None and p.numel()
                    ),
                ]
            )
            layer.zero_grad()
        results.append(per_layer)
    forward, dx, dw = (
        [ends for label, *ends in kernels.BOUNDS if label == name] for name in ("y", "dx", "dw")
    )
    bounds = []
    for layer, grad, *ends in zip(
        our.layers, grads, forward, reversed(dx), reversed(dw), strict=True
    ):
        rows = grad.flatten(0, -2).double()
        ends.append(kernels.bounds(rows.sum(0), rows.abs().sum(0), len(rows), grad.dtype))
        bounds.append(
            [
                tuple(over_ranks(config, layer, name, end) for end in both)
                for name, both in zip(("y", "dx", "dw", "db"), ends, strict=True)
            ]
        )
    return zip(*results, bounds, strict=True)


def over_ranks(config: Any, layer: Any, name: str, end: Any) -> Any:
    """Reduce a bound of this rank's summand to a bound of the result.

    bfloat16 is added up over ranks as the layers do it, which is monotonic.
    """
    import torch

    from megatron_chatflow.fp8.linear import ReferenceColumnParallelLinear

    ranks = config.parallel.tensor_model_parallel_size
    if ranks > 1 and name == ("dx" if isinstance(layer, ReferenceColumnParallelLinear) else "y"):
        torch.distributed.all_reduce(end)
        if config.parallel.sequence_parallel:
            end = end.chunk(ranks)[torch.distributed.get_rank()]
    return end


def differences(their: Tensors, our: Tensors, bounds: list[tuple[Any, Any]]) -> list[list[int]]:
    """Count elements of y, dx, dw (and db).

    Each has [all, those with one possible value, theirs out of bounds, ours out of bounds].
    """
    found = []
    for a, b, (low, high) in zip(their, our, bounds, strict=False):  # without a bias no db
        assert a.shape == b.shape and a.dtype == b.dtype == low.dtype
        low, high = low.reshape(a.shape), high.reshape(a.shape)
        outside = [int(((t < low) | (t > high)).sum()) for t in (a, b)]
        found.append([a.numel(), int((low == high).sum()), *outside])
    return found


def linears(config: Any) -> dict[str, Any]:
    """Compare column- and row-parallel layers, with and without a bias."""
    import torch

    found = {}
    tp, sp = config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel
    for kind, biases in (
        ("column", (False, True)),
        ("row", (False,)),
    ):  # no row-parallel layer of a model adds its bias itself
        for bias in biases:
            their, our, fp8_context = pair(config, kind, bias)
            inner, outer = (256, 384 // tp) if kind == "column" else (256 // tp, 384)
            tokens_in = 256 // tp if sp and kind == "column" else 256
            tokens_out = 256 // tp if sp and kind == "row" else 256
            full_in, full_out = kind == "column" and not sp, kind == "row" and not sp
            x = torch.randn(tokens_in, 2, inner, generator=generator(1)).bfloat16()
            g = (
                torch.randn(tokens_out, 2, outer, generator=generator(2))
                * torch.randn(tokens_out, 1, 1, generator=generator(3)).exp()
            ).bfloat16()
            for tensor, is_full in ((x, full_in), (g, full_out)):
                if is_full and tp > 1:
                    torch.distributed.broadcast(tensor, 0)
            stacks = Stack([their]), Stack([our], fp8_context)
            for _ in range(3):  # scales of delayed scaling are 1 at first
                (results,) = passes(config, *stacks, [x], [g])
            found[kind + (" with bias" if bias else "")] = differences(*results)
    return found


def contract(config: Any) -> dict[str, Any]:
    """Log what Transformer Engine does in two micro-batches through one row-parallel layer.

    The log has quantizations, products and updates, in order.
    """
    import torch

    from tests.fp8.emulation import kernels

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
    return {
        "first": logs[0],
        "second": logs[1],
        "recipe": type(their.fp8_meta["recipe"]).__mro__[0].__name__,
    }


def histories(config: Any) -> dict[str, Any]:
    """Compare 20 iterations of two micro-batches through three layers with changing weights.

    Scales and histories are compared by bits, products by their bounds.
    """
    import torch

    pairs = [pair(config, kind, False) for kind in ("row", "column", "row")]
    fp8_context = pairs[0][2]
    for _, our, own in pairs:  # one decoder: one fp8_context
        our.fp8_context, our.products = (
            fp8_context,
            our.products if own is fp8_context else fp8_context.products(),
        )
    their, our = Stack([p[0] for p in pairs]), Stack([p[1] for p in pairs], fp8_context)
    unequal, outside = [], 0
    for iteration in range(20):
        with torch.no_grad():
            for a, b in zip(their.layers, our.layers, strict=True):
                b.weight.mul_(
                    1 + 0.1 * torch.randn(b.weight.shape, generator=generator(iteration + 50))
                )
                a.weight.copy_(b.weight)
        for micro_batch in range(2):
            our.layers[0].current_microbatch = micro_batch
            size = 2.0 ** ((iteration * 7 + micro_batch) % 9 - 4)
            inputs = [
                (torch.randn(64, 2, 256, generator=generator(3 * iteration + i)) * size).bfloat16()
                for i in range(3)
            ]
            grads = [
                (
                    torch.randn(64, 2, 384, generator=generator(900 + iteration + i)) / size
                ).bfloat16()
                for i in range(3)
            ]
            for results in passes(config, their, our, inputs, grads):
                outside += sum(
                    of_theirs + of_ours for _, _, of_theirs, of_ours in differences(*results)
                )
        for i, (a, b) in enumerate(zip(their.layers, our.layers, strict=True)):
            state = b.products.state()
            for direction in ("fwd", "bwd"):
                meta = a.fp8_meta[f"scaling_{direction}"]
                same = torch.equal(meta.scale, state[f"scale_{direction}"]) and torch.equal(
                    meta.amax_history, state[f"amax_history_{direction}"]
                )
                if not same:
                    unequal.append([iteration, i, direction])
    return {
        "unequal": unequal,
        "outside": outside,
        "scales": [layer.products.state()["scale_fwd"].tolist() for layer in our.layers],
    }


def exchanged_states(config: Any) -> dict[str, bool]:
    """Load a state saved by one implementation into the other."""
    import torch

    their, our, fp8_context = pair(config, "row", False)
    x, g = torch.randn(64, 2, 256).bfloat16(), torch.randn(64, 2, 384).bfloat16()
    for _ in range(3):
        list(passes(config, Stack([their]), Stack([our], fp8_context), [x], [g]))
    fresh_their, fresh_our, fresh_context = pair(config, "row", False)
    fresh_their.set_extra_state(our.get_extra_state())
    fresh_our.set_extra_state(their.get_extra_state())
    results = list(
        passes(config, Stack([fresh_their]), Stack([fresh_our], fresh_context), [x], [g])
    )
    again = list(passes(config, Stack([their]), Stack([our], fp8_context), [x], [g]))
    state, meta = fresh_our.products.state(), fresh_their.fp8_meta["scaling_fwd"]
    return {
        "ours_reads_theirs": all(
            torch.equal(a, b) for a, b in zip(results[0][1], again[0][1], strict=True)
        ),
        "theirs_reads_ours": all(
            torch.equal(a, b) for a, b in zip(results[0][0], again[0][0], strict=True)
        ),
        "histories": torch.equal(state["amax_history_fwd"], meta.amax_history)
        and torch.equal(state["scale_fwd"], meta.scale),
    }


def against_their_reference(config: Any) -> list[int]:
    """Count elements of NVIDIA's own reference of current scaling outside of the kernels' bounds.

    The counts are of y, dx and dw; that reference uses torch._scaled_mm.
    """
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import (
        current_scaling_ref_quantizer_factory,
    )

    from tests.fp8.emulation import kernels

    kernels.BOUNDS.clear()
    x, g = torch.randn(128, 256).bfloat16(), torch.randn(128, 384).bfloat16()
    layer = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.randn(384, 256))
    results = []
    for kind in (
        recipe.Float8CurrentScaling(),
        recipe.CustomRecipe(qfactory=current_scaling_ref_quantizer_factory),
    ):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with te.autocast(enabled=True, recipe=kind):
            y = layer(leaf)
        y.backward(g)
        results.append([y.detach(), leaf.grad, layer.weight.grad.clone()])
    bounds = [ends for _, *ends in list(kernels.BOUNDS)[:3]]
    return [outside for _, _, *both in differences(*results, bounds) for outside in both]
