"""Memory that is used again only when nobody holds it."""

import numpy as np
import torch

from megatron_chatflow.data.blend.batch import KEEP, BufferPool

SIZE = 1 << 20


def address(array):
    return array.__array_interface__["data"][0]


def test_a_buffer_that_nobody_holds_is_used_again():
    pool = BufferPool()
    first = address(pool.take(SIZE))
    assert address(pool.take(SIZE)) == first


def test_a_buffer_that_a_view_or_a_tensor_refers_to_is_left_alone():
    pool = BufferPool()
    for hold in (
        lambda buffer: buffer,
        lambda buffer: buffer[5:9],
        lambda buffer: buffer[: SIZE // 2].view(np.int64).reshape(-1, 64)[1:, 2:].T,
        lambda buffer: torch.from_numpy(buffer[100:200]),
        lambda buffer: torch.from_numpy(buffer[100:200])[3:4].reshape(1, 1),
        lambda buffer: memoryview(buffer),
    ):
        buffer = pool.take(SIZE)
        buffer[:] = 7
        held = hold(buffer)
        del buffer
        taken = [pool.take(SIZE) for _ in range(KEEP + 2)]
        for other in taken:
            other[:] = 9
        assert int(np.asarray(held).reshape(-1).view(np.uint8)[0]) == 7
        del held, taken, other


def test_small_and_other_sizes_are_not_mixed_up():
    pool = BufferPool()
    assert [len(pool.take(size)) for size in (SIZE, 10, SIZE + 8, SIZE, 0)] == [
        SIZE,
        10,
        SIZE + 8,
        SIZE,
        0,
    ]


def test_only_a_few_buffers_are_kept():
    pool = BufferPool()
    held = [pool.take(SIZE) for _ in range(3 * KEEP)]
    assert len({address(buffer) for buffer in held}) == 3 * KEEP
    assert len(pool._buffers) == KEEP
