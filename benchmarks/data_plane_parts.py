"""The parts of data_plane.py, each of which runs in a fresh process."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SEQ, BATCH, MICRO_BATCH = 2048, 256, 8
PLACES = 200


def memory(key: str) -> float:
    """A line of /proc/self/status in MB: VmRSS (now), VmHWM (peak), RssAnon (now, without mapped
    files).
    """
    with open("/proc/self/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith(key + ":")).split()[1]) / 1024


def opened(
    started: float, imports: Callable[[], None], read: Callable[[], object]
) -> dict[str, float]:
    """Import, open and read in a new process; `started` is its start on the monotonic clock."""
    imports()
    base, base_anonymous, imported = memory("VmRSS"), memory("RssAnon"), time.monotonic()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak is counted from here
    kept = read()
    done = time.monotonic()
    result = {
        "all_seconds": done - started,
        "seconds": done - imported,
        "peak_mb": memory("VmHWM"),
        "mb": memory("VmHWM") - base,
        "anonymous_mb": memory("RssAnon") - base_anonymous,
        "files": len(os.listdir("/proc/self/fd")) - 1,
    }
    del kept
    return result


def open_ours(started: float, curriculum: str, samples: int) -> dict[str, float]:
    """Opens a curriculum's blend and reads the first global batch."""

    def imports() -> None:
        import megatron_chatflow.curriculum
        import megatron_chatflow.data  # noqa: F401

    def read() -> object:
        blend = blend_of(curriculum, samples, SEQ)
        return blend, blend.read(0, BATCH)

    return opened(started, imports, read)


def blend_of(curriculum: str, samples: int, seq_length: int) -> object:
    """This project's blend."""
    from megatron_chatflow.curriculum import BlendPlan, load_curriculum
    from megatron_chatflow.data import open_blend

    loaded = load_curriculum(curriculum)
    plan = BlendPlan(loaded, num_samples=samples, global_batch_size=BATCH, seq_length=seq_length)
    return open_blend(loaded, plan, seq_length=seq_length, seed=1, split="1")


def open_megatron(started: float, curriculum: str, samples: int, cache: str) -> dict[str, float]:
    """The same with megatron-core; `cache` is its folder of index files."""

    def read() -> object:
        blend = megatron_blend(curriculum, samples, SEQ, cache)
        return blend, [blend[i] for i in range(BATCH)]

    return opened(started, megatron_ready, read)


def megatron_ready() -> None:
    """Imports megatron-core and makes the process group that its cache asks for."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import torch
    from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset, helpers  # noqa: F401

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )


def megatron_blend(curriculum: str, samples: int, seq_length: int, cache: str) -> object:
    """megatron-core's BlendedDataset over the same corpora, with equal weights."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        unique_identifiers = {"class": "none"}
        vocab_size, eod, pad = 32_000, 0, 32_001

    prefixes = [
        entry["path"]
        for entry in json.loads(Path(curriculum).read_text(encoding="utf-8"))["domains"].values()
    ]
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend=(prefixes, [1.0 / len(prefixes)] * len(prefixes)),
        split="1",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[
        0
    ]


def read(
    curriculum: str, samples: int, cache: str, seq_length: int, rounds: int
) -> dict[str, float]:
    """Samples/s of reading in one process, medians over rounds in which the ways take turns."""
    megatron_ready()
    ours, theirs = (
        blend_of(curriculum, samples, seq_length),
        megatron_blend(curriculum, samples, seq_length, cache),
    )
    count = 4 * BATCH

    def batches(start: int) -> None:
        for at in range(start, start + count, BATCH):
            ours.read(at, at + BATCH)

    def singles(blend: object) -> Callable[[int], None]:
        def go(start: int) -> None:
            for i in range(start, start + count):
                blend[i]

        return go

    ways = {"ours": batches, "ours_single": singles(ours), "megatron": singles(theirs)}
    return rates(ways, rounds, count, samples)


def rates(
    ways: dict[str, Callable[[int], None]], rounds: int, count: int, samples: int
) -> dict[str, float]:
    """Samples/s of each way, which reads `count` samples from the start it is given; the first
    round warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in list(ways) if i % 2 else reversed(ways):
            begin = time.perf_counter()
            ways[name](i * count % (samples - count))
            seconds[name].append(time.perf_counter() - begin)
    return {name: count / statistics.median(times[1:]) for name, times in seconds.items()}


def load(curriculum: str, samples: int, cache: str, rounds: int) -> dict[str, float]:
    """Samples/s of micro-batches as tensors, steadily, when nothing else is done."""
    megatron_ready()
    import torch

    from megatron_chatflow.data import BlendDataLoader

    blend = megatron_blend(curriculum, samples, SEQ, cache)
    loader = BlendDataLoader(
        blend_of(curriculum, samples, SEQ),
        micro_batch_size=MICRO_BATCH,
        data_parallel_rank=0,
        data_parallel_size=1,
    )

    def ours() -> Iterator[int]:
        for start in range(0, samples - BATCH, BATCH):
            for batch in loader.iteration(start, BATCH):
                yield len({key: torch.from_numpy(array) for key, array in batch.items()}["tokens"])

    def megatron(workers: int) -> Iterator[int]:
        order = (range(at, at + MICRO_BATCH) for at in range(0, samples - MICRO_BATCH, MICRO_BATCH))
        for batch in torch.utils.data.DataLoader(blend, batch_sampler=order, num_workers=workers):
            yield len(batch["tokens"])

    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, batches in (
            ("ours", ours()),
            *((f"megatron_{workers}", megatron(workers)) for workers in (0, 1, 2)),
        ):
            seconds.setdefault(name, []).append(_steady(batches))
    loader.close()
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def _steady(batches: Iterator[int]) -> float:
    """Seconds a sample, after the first global batch, over the next eight; the iterator is
    ended.
    """
    for _ in range(BATCH // MICRO_BATCH):
        next(batches)
    begin = time.perf_counter()
    samples = sum(next(batches) for _ in range(8 * BATCH // MICRO_BATCH))
    each = (time.perf_counter() - begin) / samples
    batches.close()
    return each


def locate(curriculum: str, samples: int) -> dict[str, float]:
    """Milliseconds of `locate` over 1,024 samples: the worst and the median place, and the first
    call of all.
    """
    import random

    from megatron_chatflow.curriculum import BlendPlan, load_curriculum

    plan = BlendPlan(
        load_curriculum(curriculum), num_samples=samples, global_batch_size=BATCH, seq_length=SEQ
    )
    places = [0, samples - 1024, samples // 2 - 512, samples * 9 // 10 - 512]
    places += [random.Random(1).randrange(samples - 1024) for _ in range(PLACES)]

    def call(start: int) -> float:
        begin = time.perf_counter()
        plan.locate(start, start + 1024)
        return 1e3 * (time.perf_counter() - begin)

    first = call(places[-1])
    times = [min(call(place) for _ in range(3)) for place in places]
    return {"worst": max(times), "median": statistics.median(times), "first": first}


def pack(prefix: str) -> dict[str, float]:
    """Return the seconds to open a corpus of conversations the first time, and again."""
    from megatron_chatflow.data import IndexedDataset, InstructDataset, WindowOptions

    def once() -> float:
        begin = time.perf_counter()
        dataset = IndexedDataset(prefix)
        InstructDataset(
            "chat", dataset, (0, dataset.num_documents), WindowOptions(seq_length=SEQ, seed=1)
        )
        return time.perf_counter() - begin

    return {"first": once(), "again": once()}


PARTS = {part.__name__: part for part in (open_ours, open_megatron, read, load, locate, pack)}
