"""Which conversations share a window."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.data.blend.packing import pack, positions

LENGTHS = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 60)), max_size=80)


def space_left(lengths, seq_length):
    packing = pack(np.array(lengths, np.int64), seq_length)
    sizes = positions(np.array(lengths, np.int64), seq_length)
    windows = np.split(sizes[packing.order], packing.starts[1:-1]) if packing.num_windows else []
    return packing, sizes, [seq_length - int(window.sum()) for window in windows]


@given(LENGTHS, st.integers(1, 40))
def test_every_conversation_with_a_label_is_in_one_window_once_and_none_overflows(
    lengths, seq_length
):
    packing, sizes, left = space_left(lengths, seq_length)
    assert sorted(packing.order.tolist()) == np.flatnonzero(sizes > 0).tolist()
    assert all(room >= 0 for room in left)
    assert (
        np.all(np.diff(packing.starts) > 0)
        and packing.starts[0] == 0
        and packing.starts[-1] == len(packing.order)
    )
    assert packing.num_skipped == sum(n < 2 for n in lengths)
    assert packing.num_cut == sum(n > seq_length + 1 for n in lengths)


@given(LENGTHS, st.integers(1, 40))
def test_windows_are_those_of_best_fit_longest_first_done_one_by_one(lengths, seq_length):
    _, sizes, left = space_left(lengths, seq_length)
    slow = []
    for size in sorted((int(s) for s in sizes if s), reverse=True):
        fitting = [room for room in slow if room >= size]
        if fitting:
            slow.remove(min(fitting))
            slow.append(min(fitting) - size)
        else:
            slow.append(seq_length - size)
    assert sorted(left) == sorted(slow)


@given(LENGTHS, st.integers(1, 40))
def test_no_two_windows_could_have_been_one(lengths, seq_length):
    _, _, left = space_left(lengths, seq_length)
    fullest_two = sorted(left)[-2:]
    assert len(left) < 2 or sum(fullest_two) < seq_length


@pytest.mark.parametrize("seq_length", [2048, 8192])
def test_conversations_as_they_are_waste_less_than_a_hundredth(seq_length):
    lengths = np.random.default_rng(1).lognormal(5.7, 1.0, 100_000).astype(np.int64) + 2
    _, _, left = space_left(lengths, seq_length)
    assert sum(left) < 0.01 * seq_length * len(left)


def test_the_packing_is_a_function_of_the_lengths():
    lengths = np.random.default_rng(2).integers(0, 300, 5000)
    first, second = pack(lengths, 256), pack(lengths.astype(np.int32), 256)
    assert np.array_equal(first.order, second.order) and np.array_equal(first.starts, second.starts)
