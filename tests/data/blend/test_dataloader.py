"""What each rank reads, and that reading ahead cannot change it."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.curriculum import BlendPlan, constant_curriculum
from megatron_chatflow.data import BlendDataLoader, BlendedDataset, open_blend
from megatron_chatflow.errors import ChatflowError

SAMPLES = 400


@pytest.fixture(scope="module")
def blend(write_numbered):
    curriculum = constant_curriculum(
        [(0.7, write_numbered([[900]])), (0.3, write_numbered([[700]]))]
    )
    plan = BlendPlan(curriculum, num_samples=SAMPLES, global_batch_size=8, seq_length=4)
    return open_blend(curriculum, plan, seq_length=4, seed=1, split="1")


def make_loader(blend, micro=2, rank=0, size=1):
    return BlendDataLoader(
        blend, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=size
    )


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(np.array_equal(batch[key], other[key]) for key in batch)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 300))
@settings(max_examples=40)
def test_the_ranks_together_read_each_sample_once_in_megatrons_order(
    blend, size, micro, number, start
):
    gbs = size * micro * number
    everything = blend.read(start, start + gbs)
    seen = []
    for rank in range(size):
        with make_loader(blend, micro, rank, size) as loader:
            batches = loader.iteration(start, gbs)
        first = [(m * size + rank) * micro for m in range(number)]
        assert_same(
            batches,
            [{key: value[f : f + micro] for key, value in everything.items()} for f in first],
        )
        seen += [n for f in first for n in range(f, f + micro)]
    assert sorted(seen) == list(range(gbs))


NEXT = st.tuples(st.none(), st.sampled_from([None, None, 2, 4, 8]))
JUMP = st.tuples(st.integers(0, 300), st.sampled_from([2, 4, 8]))


@given(st.lists(st.one_of(NEXT, JUMP), min_size=1, max_size=12))
@settings(max_examples=40)
def test_whatever_is_asked_for_is_what_comes(blend, requests):
    start, gbs = 0, 4
    with make_loader(blend) as loader:
        for jump, size in requests:
            start, gbs = start if jump is None else jump, size or gbs
            everything = blend.read(start, start + gbs)
            assert_same(
                loader.iteration(start, gbs),
                [
                    {key: value[f : f + 2] for key, value in everything.items()}
                    for f in range(0, gbs, 2)
                ],
            )
            start = min(start + gbs, SAMPLES - 8)


class Watched(BlendedDataset):
    """A blend that notes who reads what, and fails on demand."""

    def __init__(self, blend, fails_at=None):
        super().__init__(blend.plan, blend.domains)
        self.fails_at = fails_at
        self.log = []

    def read(self, start, stop, rows=None):
        self.log.append((start, stop, threading.current_thread() is threading.main_thread()))
        if self.fails_at is not None and start <= self.fails_at < stop:
            raise OSError(5, "the disk is gone")
        return super().read(start, stop, rows)


def test_the_next_iteration_is_read_ahead_by_one_thread_and_not_again(blend):
    watched = Watched(blend)
    with make_loader(watched) as loader:
        for start in (0, 8, 16):
            loader.iteration(start, 8)
    assert watched.log[:3] == [(0, 8, True), (8, 16, False), (16, 24, False)]
    assert all(not by_caller for _, _, by_caller in watched.log[1:])


def test_nothing_is_read_ahead_beyond_the_end(blend):
    watched = Watched(blend)
    with make_loader(watched) as loader:
        loader.iteration(SAMPLES - 8, 8)
        with pytest.raises(IndexError, match=str(SAMPLES)):
            loader.iteration(SAMPLES - 4, 8)
    assert [entry[:2] for entry in watched.log] == [
        (SAMPLES - 8, SAMPLES),
        (SAMPLES - 4, SAMPLES + 4),
    ]


def test_the_last_iteration_is_read_ahead_as_well(blend):
    watched = Watched(blend)
    with make_loader(watched) as loader:
        loader.iteration(SAMPLES - 16, 8)
        loader.iteration(SAMPLES - 8, 8)
    assert watched.log == [(SAMPLES - 16, SAMPLES - 8, True), (SAMPLES - 8, SAMPLES, False)]


def test_an_error_in_the_thread_reaches_the_caller_who_asks_for_those_samples_and_no_other(blend):
    watched = Watched(blend, fails_at=9)
    with make_loader(watched) as loader:
        loader.iteration(0, 8)
        with pytest.raises(OSError, match="the disk is gone"):
            loader.iteration(8, 8)
        loader.iteration(0, 8)
        loader.iteration(16, 8)
        watched.fails_at = None
        assert len(loader.iteration(8, 8)) == 4


def test_closing_ends_the_thread(blend):
    loader = make_loader(blend)
    loader.iteration(0, 8)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("arguments", "gbs", "named"),
    [
        (
            (2, 0, 3),
            8,
            "global_batch_size 8 is not a multiple of micro_batch_size 2 x data_parallel_size 3",
        ),
        ((2, 0, 1), 0, "global_batch_size 0"),
        ((0, 0, 1), 8, "micro_batch_size 0"),
        ((1, 2, 2), 8, "data_parallel_rank 2"),
        ((1, -1, 2), 8, "data_parallel_rank -1"),
    ],
)
def test_a_global_batch_that_cannot_be_divided_is_refused(blend, arguments, gbs, named):
    with pytest.raises(ChatflowError, match=named), make_loader(blend, *arguments) as loader:
        loader.iteration(0, gbs)


def test_micro_batches_are_contiguous_and_can_be_written_to(blend):
    with make_loader(blend) as loader:
        for batch in loader.iteration(0, 8):
            assert all(
                value.flags.c_contiguous and value.flags.writeable for value in batch.values()
            )


def test_no_file_stays_open(blend):
    before = len(os.listdir("/proc/self/fd"))
    with make_loader(blend) as loader:
        loader.iteration(0, 8)
        assert len(os.listdir("/proc/self/fd")) == before
