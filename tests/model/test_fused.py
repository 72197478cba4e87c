"""The fused pieces of the portable layers against plain formulas in double precision, and against
megatron-core's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.pool import Pool

Function = Callable[..., torch.Tensor]


def _gradients(
    function: Function, inputs: list[torch.Tensor], weight: torch.Tensor
) -> list[torch.Tensor]:
    """[value, gradient of each input of sum(value x weight)]."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = function(*leaves)
    (value * weight.to(value.dtype)).sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def agree(ours: Function, plain: Function, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Our result in `dtype` is the plain formula's in float64 on the same inputs, but for rounding
    at the size of the largest element.
    """
    inputs = [t.to(dtype) for t in inputs]
    weight = torch.randn(
        plain(*(t.double() for t in inputs)).shape, generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    bound = 2e-6 if dtype == torch.float32 else 2**-7
    ours_, plain_ = (
        _gradients(ours, inputs, weight),
        _gradients(plain, [t.double() for t in inputs], weight.double()),
    )
    for mine, exact in zip(ours_, plain_, strict=True):
        assert mine.shape == exact.shape
        assert (mine.double() - exact).abs().max() <= bound * exact.abs().max()


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
def test_swiglu_is_silu_of_one_half_times_the_other(dtype: torch.dtype) -> None:
    from megatron_chatflow.model.fused import _SwiGLU

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    agree(_SwiGLU.apply, plain, [_random(33, 3, 34)], dtype)


@DTYPES
def test_the_norm_is_rms_norm(dtype: torch.dtype) -> None:
    from megatron_chatflow.model.fused import _RMSNorm

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    agree(
        lambda x, weight: _RMSNorm.apply(x, weight, 1e-3),
        plain,
        [_random(33, 3, 17), _random(17)],
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("rotated", [8, 16])
def test_rotary_positions_are_megatron_cores(dtype: torch.dtype, rotated: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from megatron_chatflow.model.fused import rotary

    angles = torch.outer(torch.arange(12.0), 100.0 ** -(torch.arange(rotated / 2) / rotated))
    freqs = torch.cat([angles, angles], -1)[:, None, None]
    agree(
        lambda t: rotary(t, freqs),
        lambda t: _apply_rotary_pos_emb_bshd(t, freqs.double()),
        [_random(12, 2, 3, 16)],
        dtype,
    )


def _losses(dtype: torch.dtype, block: int) -> tuple[list[Any], list[Any]]:
    """Value and gradient of ours on this rank's columns, and float64's on all of them, as nested
    lists.
    """
    from torch import distributed

    from megatron_chatflow.model import fused

    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    fused.BLOCK = block
    logits, labels = (_random(7, 5, 24) * 9).to(dtype), torch.arange(35).remainder(24).view(7, 5)
    columns = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
    ours = _gradients(
        lambda x: fused.cross_entropy(x, labels, distributed.group.WORLD),
        [logits[..., columns]],
        _random(7, 5),
    )
    exact = _gradients(
        lambda x: torch.nn.functional.cross_entropy(
            x.flatten(0, 1), labels.flatten(), reduction="none"
        ).view(7, 5),
        [logits.double()],
        _random(7, 5),
    )
    return [t.double().tolist() for t in ours], [exact[0].tolist(), exact[1][..., columns].tolist()]


def _in_a_group(dtype: torch.dtype, block: int) -> tuple[list[Any], list[Any]]:
    from megatron_chatflow.config.schema import ParallelSettings
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch

    launch = read_launch()
    process_groups.initialize(
        launch, ParallelSettings(tensor_model_parallel_size=launch.world_size), 1
    )
    try:
        return _losses(dtype, block)
    finally:
        process_groups.shut_down()


@pytest.mark.parametrize("ranks", [1, 2])
def test_cross_entropy_over_shards_of_the_vocabulary_is_cross_entropy(
    pool: Pool, ranks: int
) -> None:
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        for mine, exact in pool.run(ranks, _in_a_group, dtype, 1 << 17):
            for a, b in zip(mine, exact, strict=True):
                assert torch.allclose(torch.tensor(a), torch.tensor(b), rtol=bound, atol=bound)


def test_the_size_of_a_block_changes_no_bit(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_chatflow.model import fused

    assert (
        len({str(pool.run(1, _in_a_group, torch.bfloat16, block)) for block in (24, 100, 1 << 17)})
        == 1
    )
    x, weight = _random(50, 34).bfloat16(), _random(34).bfloat16()
    results = []
    for block in (34, 200, 1 << 17):
        monkeypatch.setattr(fused, "BLOCK", block)
        normed = _gradients(lambda t: fused._RMSNorm.apply(t, weight, 1e-5), [x], x)
        results.append([*_gradients(fused._SwiGLU.apply, [x], _random(50, 17)), *normed])
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )
