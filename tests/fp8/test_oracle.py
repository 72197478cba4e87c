"""The reference against Transformer Engine's Python and megatron-core's spec, emulated on a CPU.

`emulation` replaces the compiled extension; `oracle` runs the comparisons.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "build" / "oracle"
PER_TENSOR, BY_BLOCKS = ("delayed", "tensorwise"), ("blockwise", "mxfp8")
FP8 = (*PER_TENSOR, *BY_BLOCKS)

pytestmark = pytest.mark.skipif(
    not (WHEELS / "transformer_engine").is_dir(),
    reason="Transformer Engine's Python is not in build/oracle: tests/run.sh puts it there",
)


@functools.cache
def ask(extent: str, recipes: tuple[str, ...], ranks: int = 1) -> dict[str, Any]:
    """What the oracle found, {recipe: {layout: {part: found}}}."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = []
    for rank in range(ranks):
        launch = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = (
            os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            | (launch if ranks > 1 else {})
        )
        command = [sys.executable, "-m", "tests.fp8.oracle", extent, *recipes]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        answers = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(
        err[-4000:] for _, err in answers
    )
    return json.loads(answers[0][0].splitlines()[-1])


def found(recipe: str, part: str) -> Any:
    """What one process found; Hopper's recipes share one."""
    return ask("quick", ("delayed", "tensorwise", "blockwise"))[recipe]["plain"][part]


def found_in_full(recipe: str, part: str) -> Any:
    """The same including the long comparisons."""
    return ask(
        "full", ("mxfp8",) if recipe == "mxfp8" else ("delayed", "tensorwise", "blockwise", "bf16")
    )[recipe]["plain"][part]


HOPPER = pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])


def assert_products_agree(layers: dict[str, list[list[int]]]) -> None:
    for layer, tensors in layers.items():
        for name, (elements, certain, of_theirs, of_ours) in zip(
            ("y", "dx", "dw", "db"), tensors, strict=False
        ):
            assert of_theirs == of_ours == 0, (layer, name, of_theirs, of_ours)
            # Most bounds hold one number of bfloat16 only, so bits are compared.
            assert certain > 0.6 * elements, (layer, name, certain / elements)


@HOPPER
def test_outputs_and_gradients_are_exact_but_for_one_rounding_and_the_order_of_addition(
    recipe: str,
) -> None:
    layers = found(recipe, "linear")
    assert set(layers) == {"column", "column with bias", "row"}
    assert_products_agree(layers)


def test_bounds_hold_every_order_of_addition_but_no_sum_rounded_midway() -> None:
    import torch

    from tests.fp8.emulation.kernels import bounds

    generator = torch.Generator().manual_seed(0)
    terms = (
        torch.randn(4096, 512, generator=generator).bfloat16()
        * torch.randn(4096, 512, generator=generator).bfloat16()
    )
    low, high = bounds(terms.double().sum(1), terms.double().abs().sum(1), 512, torch.bfloat16)
    for _ in range(20):
        total = (
            terms[:, torch.randperm(512, generator=generator)].float().cumsum(1)[:, -1].bfloat16()
        )
        assert ((low <= total) & (total <= high)).all()
    rounded_midway = (
        terms[:, :256].float().sum(1).bfloat16() + terms[:, 256:].float().sum(1).bfloat16()
    )
    assert ((rounded_midway < low) | (rounded_midway > high)).sum() > 400


def test_nvidias_own_reference_stays_within_the_bounds_of_the_emulated_kernels() -> None:
    assert found("tensorwise", "nvidia_reference") == [0] * 6


CLASSES = {
    "delayed": ("Float8Quantizer", "TEDelayedScaling", "e5m2", "(512, 384)"),
    "tensorwise": ("Float8CurrentScalingQuantizer", "Float8CurrentScaling", "e5m2", "(512, 384)"),
    "blockwise": ("Float8BlockQuantizer", "Float8BlockScaling", "e4m3fn", "(512, 384)"),
    "mxfp8": ("MXFP8Quantizer", "MXFP8BlockScaling", "e4m3fn", "(512, 384)"),
}


def assert_contract(recipe: str, log: dict[str, Any]) -> None:
    quantizer, recipe_class, of_gradients, shape = CLASSES[recipe]

    def events(entries: list[list[str]]) -> list[str]:
        named = []
        for kind, *rest in entries:
            if kind == "quantize":
                assert rest[0] == quantizer
                assert rest[3] == "True"  # rowwise
                named.append(f"{rest[2]} {rest[1].removeprefix('torch.float8_')}")
            elif kind == "gemm":
                named.append(
                    {"TrueFalse": "y", "FalseFalse": "dx", "FalseTrue": "dw"}[rest[2] + rest[3]]
                )
            else:
                named.append("update " + rest[0].removeprefix("torch.float8_"))
        return named

    updates = recipe == "delayed"
    x, w, g = "(256, 2, 256) e4m3fn", "(384, 256) e4m3fn", f"{shape} {of_gradients}"
    forward, backward = (
        ["y"] + ["update e4m3fn"] * updates,
        [g, "dx", "dw"] + [f"update {of_gradients}"] * updates,
    )
    assert events(log["first"]) == [x, w, *forward, *backward]
    assert events(log["second"]) == [x, *forward, *backward]
    assert log["recipe"] == recipe_class


@HOPPER
def test_the_weight_is_quantized_once_per_iteration_and_scales_move_after_each_pass(
    recipe: str,
) -> None:
    assert_contract(recipe, found(recipe, "log"))


@HOPPER
def test_checkpoint_keys_and_initial_weights_are_the_same(recipe: str) -> None:
    keys = found(recipe, "keys")
    assert keys["only_one_has"] == [] and keys["unequal"] == [] and keys["tensors"] >= 10


def test_delayed_scales_and_histories_are_bit_equal_after_every_one_of_twenty_iterations() -> None:
    result = found("delayed", "histories")
    assert result["unequal"] == [] and result["outside"] == 0
    assert len({tuple(scales) for scales in result["scales"]}) == 3 and all(
        scale != 1 for scales in result["scales"] for scale in scales[:2]
    )


def test_either_implementation_continues_from_the_others_state() -> None:
    assert found("delayed", "states") == {
        "ours_reads_theirs": True,
        "theirs_reads_ours": True,
        "histories": True,
    }


def test_transformer_engine_notes_validation_in_its_histories_and_is_made_to_forget_it() -> None:
    assert found("delayed", "validation") == {"noted": True, "forgotten": True}


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_the_same_layers_stay_in_bfloat16(recipe: str) -> None:
    theirs, ours = found(recipe, "bf16_layers")
    assert theirs == ours and len(ours) == 4 and all("layers.1." in name for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*FP8, "bf16"])
def test_fifty_steps_over_packed_documents_stay_together(recipe: str) -> None:
    curves = found_in_full(recipe, "curves")
    far = {
        other: max(abs(a - b) for a, b in zip(curves["ours"], curves[other], strict=True))
        for other in ("theirs", "bf16")
    }
    print(
        f"{recipe}: {far['theirs']:.4f} nat from Transformer Engine, {far['bf16']:.4f} from "
        f"bfloat16"
    )
    assert curves["ours"][-1] < curves["ours"][0] - 1
    assert far["theirs"] < 0.05 and far["bf16"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*FP8, "bf16"])
def test_checkpoints_pass_between_the_implementations_and_into_bfloat16(recipe: str) -> None:
    results = found_in_full(recipe, "checkpoints")
    assert all(results.values()), results
    assert results["ours_to_theirs_tensors"] == (69 if recipe == "delayed" else 21)


@pytest.mark.slow
def test_mxfp8_on_blackwell_agrees_in_everything() -> None:
    assert_products_agree(found_in_full("mxfp8", "linear"))
    assert_contract("mxfp8", found_in_full("mxfp8", "log"))
    keys = found_in_full("mxfp8", "keys")
    assert keys["only_one_has"] == [] and keys["unequal"] == []
    theirs, ours = found_in_full("mxfp8", "bf16_layers")
    assert theirs == ours and len(ours) == 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "sequence_parallel"])
@pytest.mark.parametrize("recipe", FP8)
def test_two_tensor_parallel_ranks_agree_with_and_without_sequence_parallelism(
    recipe: str, layout: str
) -> None:
    group = ("mxfp8",) if recipe == "mxfp8" else ("delayed", "tensorwise", "blockwise")
    assert_products_agree(ask("quick", group, 2)[recipe][layout]["linear"])
