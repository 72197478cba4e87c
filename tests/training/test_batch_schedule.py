"""How many iterations a run has and what each reads, also where the batch size changed on the
way.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.config import Config
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.training.batch_schedule import (
    Batches,
    batch_history,
    batches_state,
    count_iterations,
    fix_length,
    samples_of_iteration,
)
from tests.curriculum.cases import quick


def settings(global_batch_size: int, rampup: list[int] | None = None, **length: int) -> Config:
    return Config().replace(global_batch_size=global_batch_size, rampup_batch_size=rampup, **length)


def walk(legs: list[tuple[Config, int]], total: int) -> list[tuple[int, int]]:
    """The samples of every iteration, one after the other, as a loop reads them: legs are settings
    and how many iterations they hold at most.
    """
    ranges, consumed = [], 0
    for config, iterations in legs:
        for _ in range(iterations):
            t, size = config.training, config.training.global_batch_size
            if t.rampup_batch_size and consumed <= t.rampup_batch_size[2]:
                start, increment, samples = t.rampup_batch_size
                size = min(
                    size,
                    start + int(consumed * (size - start) / increment / samples + 1e-9) * increment,
                )
            if consumed + size > total:
                break
            ranges.append((consumed, consumed + size))
            consumed += size
    return ranges


@quick(100)
@given(
    st.lists(
        st.tuples(st.sampled_from((4, 8, 12, 20)), st.booleans(), st.integers(1, 9)),
        min_size=1,
        max_size=4,
    ),
    st.integers(200, 900),
)
def test_every_iteration_is_found_as_a_loop_would_read_it_whatever_changed_before(
    legs: list[tuple[int, bool, int]], total: int
) -> None:
    plans = [
        (settings(size, [4, 4, 64] if ramp and size > 4 else None, train_samples=total), count)
        for size, ramp, count in legs
    ]
    ranges: list[tuple[int, int]] = []
    history: tuple[Batches, ...] = ()
    for i in range(len(plans)):
        done = walk(plans[:i], total)
        iteration, consumed = len(done), done[-1][1] if done else 0
        history = batch_history(plans[i][0], batches_state(history), iteration, consumed)
    ranges = walk([*plans[:-1], (plans[-1][0], total)], total)
    assert count_iterations(history, total) == len(ranges)
    assert [samples_of_iteration(history, n) for n in range(1, len(ranges) + 1)] == ranges


def test_a_history_grows_only_where_the_batch_size_changes() -> None:
    one = batch_history(settings(8, train_samples=80))
    assert (
        batch_history(settings(8, train_samples=160), batches_state(one), 10, 80)
        == one
        == (Batches(0, 0, 8),)
    )
    two = batch_history(settings(16, train_samples=160), batches_state(one), 10, 80)
    assert two == (Batches(0, 0, 8), Batches(10, 80, 16))
    assert batch_history(settings(8, train_samples=160), batches_state(two), 5, 40) == one


def test_train_iters_counts_iterations_of_every_size() -> None:
    same = settings(8, train_iters=20)
    assert fix_length(same, 10, 80) is same
    changed = fix_length(settings(16, train_iters=20), 10, 80)
    assert (changed.training.train_iters, changed.training.train_samples) == (None, 240)
    samples = settings(16, train_samples=500)
    assert fix_length(samples, 10, 80) is samples


@pytest.mark.parametrize("length", [{"train_iters": 9}, {"train_samples": 79}])
def test_a_run_that_would_end_before_the_checkpoint_is_refused(length: dict[str, int]) -> None:
    with pytest.raises(
        ChatflowError,
        match=(
            r"the checkpoint is at iteration 10, sample 80; give a longer run, or an earlier "
            r"checkpoint"
        ),
    ):
        fix_length(settings(8, **length), 10, 80)
