"""Conversations whose answers are cut off at seq_length: counted, warned of, refused, and never a
reason to read other samples in a run in flight.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.training.resume_plan import check_identity
from tests.pool import Pool, command
from tests.sample import train


def note_of(sample: Path, seq_length: int) -> tuple[int, str]:
    words = ["--config", str(sample / "run.yaml"), "--curriculum", str(sample / "curriculum.yaml")]
    code, out, err = command("plan", *words, "--seq-length", str(seq_length))
    return code, next((line for line in (out + err).splitlines() if "domain instruct" in line), "")


def test_plan_counts_what_seq_length_cuts_off_and_warns_above_one_percent(sample: Path) -> None:
    code, line = note_of(sample, 32)
    assert code == 0 and line.startswith("warning: domain instruct: at seq_length 32, ")
    assert (
        "conversations (26.9%) have no token to train on and are left out, 250 are cut, and "
        "97.2% of the tokens"
    ) in line
    code, line = note_of(sample, 340)
    assert code == 0 and line.startswith(
        "domain instruct: at seq_length 340, 0 of 342 conversations (0.0%)"
    )
    assert note_of(sample, 380) == (0, "")


def test_a_domain_that_trains_on_nothing_is_refused_by_plan_and_train(
    pool: Pool, sample: Path
) -> None:
    code, line = note_of(sample, 16)
    assert (
        code == 2
        and (
            "none of its 342 conversations has a token to train on among its first 17 "
            "(seq_length + 1): raise seq_length"
        )
        in line
    )
    ((code, _, err),) = pool.run(1, train, sample, "--seq-length", "16")
    assert code == 2 and "none of its 342 conversations" in err


def identity(**more: dict[str, int]) -> dict[str, object]:
    return {
        "seed": 1,
        "split": "1",
        "tokenizer": None,
        "corpora": {"chat": "a"},
        "documents": {"chat": [0, 9]},
        **more,
    }


def test_a_resume_that_would_pack_other_conversations_is_refused() -> None:
    check_identity(identity(), identity(left_out={"chat": 0}))
    check_identity(identity(left_out={"chat": 3}), identity(left_out={"chat": 3}))
    with pytest.raises(
        ChatflowError,
        match=(
            "domain chat: 3 conversations .* 0 were so far, .*; resume with the version that "
            "made the checkpoint"
        ),
    ):
        check_identity(identity(), identity(left_out={"chat": 3}))
    with pytest.raises(
        ChatflowError,
        match="domain chat: 0 conversations .* 3 were so far, .*; restore train_on_prompt",
    ):
        check_identity(identity(left_out={"chat": 3}), identity(left_out={"chat": 0}))
