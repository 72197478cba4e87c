"""Delayed scaling: the rule, against one written out number by number, and its state."""

from __future__ import annotations

import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.fp8 import extra_state
from megatron_chatflow.fp8.delayed_scaling import update
from tests.fp8.emulation.arithmetic import update_history

AMAXES = st.sampled_from([0.0, 0.0, 1e-30, 0.37, 1.0, 5.5, 3e38, math.inf])


@given(
    length=st.integers(1, 5),
    algo=st.sampled_from(["max", "most_recent"]),
    margin=st.integers(0, 3),
    passes=st.lists(st.tuples(AMAXES, AMAXES, AMAXES), min_size=1, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_scales_and_histories_follow_the_rule_pass_by_pass(
    length: int, algo: str, margin: int, passes: list[tuple[float, ...]]
) -> None:
    history, scale = torch.zeros(length, 3), torch.ones(3)
    their_history, their_scale = history.clone(), scale.clone()
    for amaxes in passes:
        current = torch.tensor(amaxes)
        history[0] = their_history[0] = current
        history, scale = update(history, scale, current, 448.0, margin=margin, algo=algo)
        update_history(their_history, their_scale, current, 448.0, margin=margin, algo=algo)
        assert torch.equal(history, their_history) and torch.equal(scale, their_scale)
        assert scale.isfinite().all() and (scale > 0).all()


def test_a_tensor_that_did_not_occur_keeps_its_history_and_scale() -> None:
    history, scale = torch.tensor([[0.0], [3.0], [7.0]]), torch.tensor([64.0])
    after = update(history, scale, torch.zeros(1), 448.0, margin=0, algo="max")
    assert torch.equal(after[0], history) and torch.equal(after[1], scale)


def test_the_window_holds_as_many_passes_as_it_is_long() -> None:
    history, scale = torch.zeros(3, 1), torch.ones(1)
    seen = []
    for amax in (8.0, 4.0, 2.0, 1.0):
        history, scale = update(history, scale, torch.tensor([amax]), 448.0, margin=0, algo="max")
        seen.append(448.0 / float(scale))
    assert seen == [8.0, 8.0, 8.0, 4.0]


def tensors(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = {
        "scale_fwd": (3,),
        "amax_history_fwd": (length, 3),
        "scale_bwd": (2,),
        "amax_history_bwd": (length, 2),
    }
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


@pytest.mark.parametrize("hybrid", [True, False])
@pytest.mark.parametrize("length", [1, 5, 1030])
def test_a_state_is_read_back_unchanged(length: int, hybrid: bool) -> None:
    saved = tensors(length)
    found = extra_state.unpack(extra_state.pack(saved, hybrid=hybrid), length)
    assert set(found) == set(saved) and all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.mark.parametrize("hybrid", [True, False])
def test_equal_states_have_equal_bytes(hybrid: bool) -> None:
    packed = extra_state.pack(tensors(5), hybrid=hybrid)
    assert torch.equal(packed, extra_state.pack(tensors(5), hybrid=hybrid))
    assert torch.equal(packed, extra_state.rewrite(packed))


def test_a_state_fits_a_run_with_another_length_of_history() -> None:
    packed = extra_state.pack(tensors(5), hybrid=True)
    longer, shorter = extra_state.unpack(packed, 8), extra_state.unpack(packed, 2)
    assert longer["amax_history_fwd"].shape == (8, 3) and not longer["amax_history_fwd"][5:].any()
    assert torch.equal(shorter["amax_history_bwd"], tensors(5)["amax_history_bwd"][:2])


def test_no_state_and_an_empty_state_start_from_scratch() -> None:
    assert extra_state.unpack(None, 4) is None
    assert extra_state.unpack(torch.empty(0, dtype=torch.uint8), 4) is None


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_a_state_cannot_run_code() -> None:
    inside = io.BytesIO()
    torch.save(Malicious(), inside)
    through_torch = (
        b"\x80\x03ctorch.storage\n_load_from_bytes\n"
        + pickle.dumps(inside.getvalue(), 3)[2:-1]
        + b"\x85R."
    )
    through_the_recipes = (
        b"\x80\x04\x8c\x20transformer_engine.common.recipe\x8c\x09os.system\x93\x8c\x04true\x85R."
    )
    for evil, reason in (
        (pickle.dumps(Malicious()), "it refers to builtins.exec"),
        (pickle.dumps(tensors(4) | {"extra": Malicious()}), "it refers to builtins.exec"),
        (through_torch, "it refers to __builtin__.exec"),
        (through_the_recipes, "it refers to transformer_engine.common.recipe.os.system"),
    ):
        with pytest.raises(pickle.UnpicklingError, match=reason):
            extra_state.unpack(torch.frombuffer(bytearray(evil), dtype=torch.uint8), 4)
