"""bfloat16 products in float32: their values, and when they are made so."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_chatflow.distributed import bf16_matmul, kernels
from tests.fp8.emulation.kernels import bounds
from tests.pool import Pool


def random(rows: int, columns: int, transposed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    if transposed:
        return torch.randn(columns, rows, generator=generator).bfloat16().t()
    return torch.randn(rows, columns, generator=generator).bfloat16()


@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
@pytest.mark.parametrize(
    "shape", [(1, 48, 96), (2, 96, 48), (96, 48, 2), (48, 96, 30), (30, 48, 96), (96, 30, 48)]
)
def test_a_product_is_the_exact_one_rounded_once_up_to_the_order_of_addition(
    shape: tuple[int, int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16_matmul, "BLOCK", block)
    m, k, n = shape
    for left, right, scale, with_bias in itertools.product(
        (False, True), (False, True), (1.0, 0.37), (False, True)
    ):
        a, b = random(m, k, left), random(k, n, right)
        bias = random(1, n, False)[0] if with_bias else None
        scale = float(torch.tensor(scale))
        exact, magnitudes = (
            a.double() @ b.double() * scale,
            a.double().abs() @ b.double().abs() * scale,
        )
        if bias is not None:
            exact, magnitudes = exact + bias.double(), magnitudes + bias.double().abs()
        low, high = bounds(exact, magnitudes, k, torch.bfloat16)
        found = bf16_matmul.mm_in_float32(a, b, scale, bias)
        assert found.dtype == torch.bfloat16 and found.shape == (m, n)
        assert ((low <= found) & (found <= high)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batched_products_keep_the_type(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (
        random(5 * rows, columns, False).view(5, rows, columns).to(dtype)
        for rows, columns in ((7, 33), (33, 9))
    )
    exact, magnitudes = (
        torch.bmm(a.double(), b.double()),
        torch.bmm(a.double().abs(), b.double().abs()),
    )
    low, high = bounds(exact, magnitudes, 33, dtype)
    for way in (True, False):
        monkeypatch.setattr(bf16_matmul, "_agreed", way)
        found = bf16_matmul.bmm(a, b)
        assert found.dtype == dtype and ((low <= found) & (found <= high)).all()


@pytest.mark.parametrize(
    ("features", "machine", "environment", "units"),
    [
        (("avx2",), "x86_64", {}, False),
        (("avx2", "avx512f"), "x86_64", {}, False),
        (("avx2",), "x86_64", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (("avx2", "avx512f", "avx512_bf16"), "x86_64", {}, True),
        (("avx2", "avx512f", "amx_bf16", "avx512_bf16"), "x86_64", {}, True),
        (("avx2", "avx512f", "amx_bf16"), "x86_64", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, None),
        ((), "x86_64", {}, None),
        ((), "aarch64", {}, None),
    ],
)
def test_the_features_of_the_cpu_decide_where_they_can_and_the_clock_elsewhere(
    features: tuple[str, ...],
    machine: str,
    environment: dict[str, str],
    units: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in kernels.LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kernels, "cpu_features", lambda: features)
    monkeypatch.setattr(kernels.platform, "machine", lambda: machine)
    assert kernels.has_bf16_units() is units
    measured = []
    monkeypatch.setattr(
        bf16_matmul, "_is_float32_faster_by_the_clock", lambda: measured.append(1) or True
    )
    assert bf16_matmul.is_float32_faster.__wrapped__() is (units is not True)
    assert len(measured) == (units is None)


def test_the_clock_agrees_with_the_features_of_this_cpu() -> None:
    units = kernels.has_bf16_units()
    if units is None:
        pytest.skip("the features of this CPU do not decide")
    assert bf16_matmul._is_float32_faster_by_the_clock() is not units


def agreed(needs: tuple[bool, ...]) -> bool:
    import os

    from megatron_chatflow.config import make_parser, parse, resolve
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch

    launch = read_launch()
    asked, bf16_matmul.is_float32_faster = (
        bf16_matmul.is_float32_faster,
        lambda: needs[int(os.environ.get("RANK", "0"))],
    )
    try:
        words = (
            "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 "
            "--micro-batch-size 1 --train-iters 1 --lr 1"
        )
        config = resolve(
            parse(make_parser("chatflow train", ""), words.split())[0], launch.world_size
        )
        process_groups.initialize(launch, config.parallel, 1)
        return bf16_matmul.uses_float32()
    finally:
        process_groups.shut_down()
        bf16_matmul.is_float32_faster = asked


@pytest.mark.parametrize(
    ("needs", "used"), [((False, True), True), ((True, True), True), ((False, False), False)]
)
def test_all_ranks_take_the_way_that_the_slowest_needs(
    needs: tuple[bool, bool], used: bool, pool: Pool
) -> None:
    assert pool.run(2, agreed, needs) == [used, used]
    assert pool.run(1, agreed, (False,)) == [False]
