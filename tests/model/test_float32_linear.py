"""On a CPU without bfloat16 units no product of the portable layers is made in bfloat16, and
results are megatron-core's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.pool import Pool

WORDS = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --ffn-hidden-size 128 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --seq-length 128 "
    "--micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1e-3 "
    "--attention-dropout 0 --hidden-dropout 0 --bf16"
)


@contextmanager
def groups(words: str = "", *, in_float32: bool = True) -> Iterator[Any]:
    """Settings and process groups of a job on CPUs that have no bfloat16 units, or have them."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_chatflow.config import make_parser, parse, resolve
    from megatron_chatflow.distributed import bf16_matmul, process_groups
    from megatron_chatflow.distributed.launch import read_launch

    launch = read_launch()
    asked, bf16_matmul.is_float32_faster = bf16_matmul.is_float32_faster, lambda: in_float32
    config = resolve(
        parse(make_parser("chatflow train", ""), f"{WORDS} {words}".split())[0], launch.world_size
    )
    process_groups.initialize(launch, config.parallel, config.model.num_layers)
    model_parallel_cuda_manual_seed(1)
    try:
        yield config
    finally:
        process_groups.shut_down()
        bf16_matmul.is_float32_faster = asked
        bf16_matmul._agreed = None


def slow_products(words: str, in_float32: bool) -> tuple[set[str], int]:
    """(names of the operations that multiplied bfloat16 matrices, number of products) in a training
    pass, an evaluation and a generated token.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    slow, products = set(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = str(function)
            if any(
                part in name
                for part in (
                    "mm",
                    "matmul",
                    "bmm",
                    "addmv",
                    "scaled_dot",
                    "flash_attention",
                    "linear.",
                )
            ):
                tensors = [a for a in args if isinstance(a, torch.Tensor)]
                products.append(name)
                if (
                    any(t.dtype == torch.bfloat16 for t in tensors)
                    and max(t.shape[-2] for t in tensors if t.dim() > 1) > 2
                ):
                    rows = tensors[0].shape[0] if tensors[0].dim() == 2 else 3
                    if rows > 2:
                        slow.add(name)
            return function(*args, **(kwargs or {}))

    from megatron.core.inference.contexts import StaticInferenceContext

    from megatron_chatflow.model.gpt import build_model

    with groups(words, in_float32=in_float32) as config:
        (model,) = build_model(config, 250, "local", wrap=False)  # padding is masked in place
        tokens = torch.randint(0, 250, (2, 128), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(128).expand(2, 128)
        with Watch():
            model(tokens, positions, None, labels=tokens).mean().backward()
            with torch.no_grad():
                model.eval()(tokens, positions, None, labels=tokens)
                context = StaticInferenceContext(4, 16)
                model(
                    tokens[:1, :8].expand(4, 8),
                    positions[:1, :8].expand(4, 8),
                    None,
                    inference_context=context,
                    runtime_gather_output=True,
                )
                context.increment_sequence_len_offset(8)
                context.enable_decode_mode()
                model(
                    tokens[:1, 8:9].expand(4, 1),
                    positions[:1, 8:9].expand(4, 1),
                    None,
                    inference_context=context,
                    runtime_gather_output=True,
                )
        return slow, len(products)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--add-qkv-bias --attention-dropout 0.1",
        "--untie-embeddings-and-output-weights --disable-bias-linear",
    ]
    + [
        f"--fp8-format {form} --fp8-recipe {recipe}"
        for form, recipe in (("hybrid", "delayed"), ("hybrid", "tensorwise"), ("e4m3", "mxfp8"))
    ],
)
def test_no_product_of_more_than_two_rows_is_made_in_bfloat16(words: str, pool: Pool) -> None:
    ((slow, products),) = pool.run(1, slow_products, words, True)
    assert slow == set() and products > 40


def test_the_watch_sees_bfloat16_products_where_the_cpu_has_units_for_them(pool: Pool) -> None:
    ((slow, _),) = pool.run(1, slow_products, "", False)
    assert {"aten.mm.default", "aten.bmm.default"} <= slow


def linear(words: str, in_float32: bool, frozen: bool) -> list[torch.Tensor]:
    """y, dx, dw and db of a column- and a row-parallel layer over small whole numbers, whose sums
    are exact in bfloat16 in any order.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers

    from megatron_chatflow.model import float32_linear
    from megatron_chatflow.model.gpt import transformer_config

    found = []
    with groups(words, in_float32=in_float32) as config:
        core = transformer_config(config, "local")
        assert (
            layers.LinearWithGradAccumulationAndAsyncCommunication is float32_linear._Trained
        ) or not in_float32
        ranks, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        common = {
            "config": core,
            "init_method": lambda w: None,
            "bias": True,
            "skip_bias_add": False,
        }
        column = ColumnParallelLinear(16, 24, gather_output=False, **common)
        row = RowParallelLinear(16, 24, input_is_parallel=True, **common)
        for layer, parallel_in in ((column, False), (row, True)):
            draw = torch.Generator().manual_seed(10 + rank)
            split = core.sequence_parallel and not parallel_in
            x = torch.randint(
                -1,
                2,
                (8 // (ranks if split else 1), 2, 16 // (ranks if parallel_in else 1)),
                generator=draw,
            ).bfloat16()
            if ranks > 1 and not split and not parallel_in:
                torch.distributed.broadcast(x, 0)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=draw))
            layer.requires_grad_(not frozen)
            x.requires_grad_()
            y, _ = layer(x)
            y.backward(
                torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(3)).to(
                    y.dtype
                )
            )
            found += [
                y.detach(),
                x.grad,
                *(p.grad for p in layer.parameters() if p.grad is not None),
            ]
    return found


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ""),
        (2, "--tensor-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_outputs_and_gradients_are_those_of_megatron_core(
    ranks: int, words: str, frozen: bool, pool: Pool
) -> None:
    for ours, theirs in zip(
        pool.run(ranks, linear, words, True, frozen),
        pool.run(ranks, linear, words, False, frozen),
        strict=True,
    ):
        assert len(ours) == len(theirs) == (4 if frozen else 8)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(t.abs().max() > 1 for t in ours)
