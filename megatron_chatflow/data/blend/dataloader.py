"""The samples that a data-parallel rank reads in an iteration, read one iteration ahead."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from megatron_chatflow.data.blend.batch import Batch
from megatron_chatflow.data.blend.blended_dataset import BlendedDataset
from megatron_chatflow.errors import DataError


def rank_rows(
    global_batch_size: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> np.ndarray:
    """Return which samples of a global batch a rank reads, in Megatron's order.

    Micro-batch m of rank r is the samples (m * DP + r) * mbs .. + mbs.

    Returns:
        int64 [micro-batches, micro_batch_size], counted from the first sample of the global batch.

    Raises:
        DataError: the global batch cannot be divided among ranks and micro-batches.
    """
    if global_batch_size < 1 or global_batch_size % (micro_batch_size * data_parallel_size):
        raise DataError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
            f"{micro_batch_size} x data_parallel_size "
            f"{data_parallel_size}: change one of them"
        )
    return np.arange(global_batch_size).reshape(-1, data_parallel_size, micro_batch_size)[
        :, data_parallel_rank
    ]


class BlendDataLoader:
    """Reads the micro-batches of one rank; a thread reads the iteration that is expected next.

    The prefetch is keyed by what it read: a request for exactly that is answered from it, any other
    request is simply read. So it cannot shift the order, whatever is requested. It holds one
    iteration of the rank in memory in addition to the caller's.

    Args:
        blend: where samples come from; any object with `len` and `read(start, stop, rows)`.
        micro_batch_size: samples in a micro-batch.
        data_parallel_rank, data_parallel_size: which part of each global batch is read here.

    Raises:
        DataError: a size is not positive, or the rank is not in [0, data_parallel_size).
    """

    def __init__(
        self,
        blend: BlendedDataset,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if micro_batch_size < 1 or data_parallel_size < 1:
            raise DataError(
                f"micro_batch_size {micro_batch_size} and data_parallel_size "
                f"{data_parallel_size} must be positive"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DataError(
                f"data_parallel_rank {data_parallel_rank} is not in 0 .. {data_parallel_size - 1}"
            )
        self.blend = blend
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[tuple[int, int], Future[list[Batch]]] | None = None

    def __enter__(self) -> "BlendDataLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def iteration(self, start: int, global_batch_size: int) -> list[Batch]:
        """Return the rank's micro-batches of one iteration.

        Args:
            start: first sample of the global batch (the samples consumed before).
            global_batch_size: its size; may differ from call to call.

        Returns:
            Batches as `BlendedDataset.read`, [micro_batch_size, ...] each.

        Raises:
            DataError: the global batch cannot be divided among ranks and micro-batches.
            IndexError: it is beyond the end of the plan.
            OSError: what reading raised, in the thread or here.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (start, global_batch_size):
            batches = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            batches = self._read(start, global_batch_size)
        following = (start + global_batch_size, global_batch_size)
        if sum(following) <= len(self.blend):
            self._ahead = following, self._thread.submit(self._read, *following)
        return batches

    def close(self) -> None:
        """End the thread and drop what it read; the loader cannot be used after this."""
        self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def _read(self, start: int, global_batch_size: int) -> list[Batch]:
        rows = rank_rows(
            global_batch_size,
            self.micro_batch_size,
            self.data_parallel_rank,
            self.data_parallel_size,
        )
        batch = self.blend.read(start, start + global_batch_size, rows.reshape(-1))
        size = self.micro_batch_size
        return [
            {key: value[m * size : (m + 1) * size] for key, value in batch.items()}
            for m in range(len(rows))
        ]
