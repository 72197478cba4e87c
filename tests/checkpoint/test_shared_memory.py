"""The memory that a rank shares with the process that writes its shards."""

from __future__ import annotations

import mmap
import random
import resource

import pytest

from tests.pool import Pool

ROUNDS = 40


def bits(tensor: object) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def copies_and_reads(seed: int) -> list[str]:
    """Copy checkpoints of many sizes, and list what another mapping of the memory reads wrongly."""
    import torch

    from megatron_chatflow.checkpoint.shared_memory import SharedTensorBuffer

    source, buffer, wrong = random.Random(seed), SharedTensorBuffer(), []
    for i in range(ROUNDS):
        tensors = []
        for _ in range(source.randrange(1, 9)):
            shape = [source.randrange(0, 9) for _ in range(source.randrange(0, 4))]
            kind = source.choice(
                [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
            )
            tensor = torch.randint(0, 2 if kind is torch.bool else 100, shape).to(kind)
            tensors.append(tensor.mT if tensor.dim() > 1 and source.random() < 0.5 else tensor)
        ((path, name, (objects, slots)),) = buffer.copy(
            [("folder/file", "file", (["object"], list(enumerate(tensors))))]
        )
        with mmap.mmap(buffer.file, buffer.size) if buffer.size else mmap.mmap(-1, 1) as memory:
            for (number, slot), tensor in zip(slots, tensors, strict=True):
                found = slot.within(memory).clone()
                if (found.dtype, found.shape, bits(found)) != (
                    tensor.dtype,
                    tensor.shape,
                    bits(tensor),
                ):
                    wrong.append(f"checkpoint {i}, tensor {number}: {slot}")
        if (path, name, objects) != ("folder/file", "file", ["object"]):
            wrong.append(f"checkpoint {i}: {path, name, objects}")
    buffer.close()
    return wrong


def copy_beyond_the_limit() -> tuple[bool, bool]:
    """(a failed allocation raises OSError, the previous memory stays in use)."""
    import torch

    from megatron_chatflow.checkpoint.shared_memory import SharedTensorBuffer

    buffer, before = SharedTensorBuffer(), resource.getrlimit(resource.RLIMIT_FSIZE)
    small, large = ([("path", "name", ([], [(0, torch.ones(size))]))] for size in (100, 100_000))
    buffer.copy(small)
    memory = buffer.file, buffer.size
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        buffer.copy(large)
        refused = False
    except OSError:
        refused = True
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    buffer.copy(small)
    return refused, memory == (buffer.file, buffer.size)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_copied_is_read_by_another_mapping(pool: Pool, seed: int) -> None:
    assert pool.run(1, copies_and_reads, seed) == [[]]


def test_a_failed_allocation_changes_nothing(pool: Pool) -> None:
    assert pool.run(1, copy_beyond_the_limit) == [(True, True)]
