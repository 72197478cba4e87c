"""The data plane against megatron-core's GPTDataset and BlendedDataset, side by side in one run.

    python benchmarks/data_plane.py     # tables, then one JSON object; three minutes, 2 GB of files

What is compared:

- Opening: 100 text domains of 10**6 documents (60 billion tokens), from the start of a fresh
  process to its first global batch of 256 samples of 2,048 tokens. This project follows a
  curriculum that moves all the time; megatron-core has constant equal weights and 10**7 samples. It
  is measured twice: `first start` builds its index files, as after every change of weights, horizon
  or sequence length; `restart` finds them in its cache. Ratios leave the imports of both sides out;
  `open_seconds` and `open_mb` (horizon 10**9) are all of it, imports too. The 100 corpora are one
  file under 100 names, and its tokens are a hole in the file: neither side is held up by a disk.
- Reading: samples/s in one process from 4 corpora of random tokens, in the order of the blend.
  megatron-core gives samples one by one, without an attention mask, nothing reset: its fastest way.
  This project reads global batches of 256, or (`one by one`) samples as well.
- Loader: micro-batches of 8 as torch tensors; this project's prefetching Loader against a torch
  DataLoader over megatron-core's dataset with 0, 1 and 2 workers, of which the best counts.
- locate: 1,024 samples in a row anywhere among 10**11, the worst of many places (best of three
  calls at each).

The sides take turns and medians are compared, so a slow moment of the machine meets both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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


def child(part: str, *arguments: object) -> dict[str, float]:
    """Runs one of `PARTS` in a fresh process and returns what it found."""
    words = [sys.executable, __file__, "--part", part, json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(
        subprocess.run(
            words, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()[-1]
    )


def bare_interpreter(code: str) -> float:
    """Peak memory of a Python process that runs `code`, in MB."""
    code += (
        "\nprint(next(line.split()[1] for line in open('/proc/self/status') if "
        "line.startswith('VmHWM')))"
    )
    return (
        int(
            subprocess.run(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
            ).stdout
        )
        / 1024
    )


def write_corpora(folder: str, documents: int, conversations: int) -> None:
    """The corpora of all parts, below `folder`, and their curricula `many<N>.json` and
    `text.json`.
    """
    import numpy as np
    import synthetic

    synthetic.write_sparse(f"{folder}/base", synthetic.lengths_of_documents(documents, 0), 1)
    many = {f"d{i:03}": f"{folder}/d{i:03}" for i in range(1000)}
    for prefix in many.values():
        synthetic.link(f"{folder}/base", prefix)
    for count in (4, 100, 1000):
        synthetic.write_curriculum(f"{folder}/many{count}.json", dict(list(many.items())[:count]))
    text = {f"t{i}": f"{folder}/t{i}" for i in range(4)}
    for i, prefix in enumerate(text.values()):
        synthetic.write_text(prefix, 50_000, i)
    synthetic.write_curriculum(f"{folder}/text.json", text)
    turns = np.clip(
        np.random.default_rng(3).lognormal(4.8, 0.9, 2 * conversations), 2, 10_000
    ).astype(np.int32)
    synthetic.write_sparse(f"{folder}/chat", turns, 2, np.arange(2 * conversations) % 2 == 0)


def measure(folder: str, scale: int, rounds: int) -> dict[str, dict[str, float]]:
    """Everything, by name; `scale` divides the sizes."""
    horizon, text_samples = 10**7 // scale, 36_000
    write_corpora(folder, 10**6 // scale, 5 * 10**6 // scale)
    many, text = f"{folder}/many100.json", f"{folder}/text.json"
    turns: dict[str, list[dict[str, float]]] = {}
    for i in range(rounds):
        cache = f"{folder}/cache{i}"
        for name, part, arguments in (
            ("ours_9", "open_ours", (many, 10**9)),
            ("ours_6", "open_ours", (many, 10**6)),
            ("ours_7", "open_ours", (many, horizon)),
            ("ours_1000", "open_ours", (f"{folder}/many1000.json", 10**9)),
            ("megatron_first", "open_megatron", (many, horizon, cache)),
            ("megatron_restart", "open_megatron", (many, horizon, cache)),
        ):
            turns.setdefault(name, []).append(child(part, time.monotonic(), *arguments))
        subprocess.run(["rm", "-r", cache], check=True)
    found = {
        name: {key: statistics.median(turn[key] for turn in each) for key in each[0]}
        for name, each in turns.items()
    }
    for seq_length in (2048, 4096):
        found[f"read_{seq_length}"] = child(
            "read",
            text,
            text_samples * 2048 // seq_length,
            f"{folder}/cache",
            seq_length,
            4 * rounds + 1,
        )
    found["load"] = child("load", text, text_samples, f"{folder}/cache", rounds)
    for count in (4, 100):
        found[f"locate_{count}"] = child("locate", f"{folder}/many{count}.json", 10**11)
    found["pack"] = child("pack", f"{folder}/chat")
    found["bare"] = {"python": bare_interpreter(""), "numpy": bare_interpreter("import numpy")}
    return found


def show(found: dict[str, dict[str, float]]) -> None:
    """Prints the tables."""
    bare = found["bare"]
    print(
        f"{'opening to the first global batch':<52} {'imports too':>12} {'without':>9} "
        f"{'peak MB':>9} {'growth':>8} {'anonymous':>10} {'files':>6}"
    )
    for name, label in (
        ("ours_9", "100 domains, 10**9 samples"),
        ("ours_6", "100 domains, 10**6 samples"),
        ("ours_7", "100 domains, megatron-core's horizon"),
        ("ours_1000", "1,000 domains, 10**9 samples"),
        ("megatron_first", "megatron-core, 100 domains, first start"),
        ("megatron_restart", "megatron-core, 100 domains, restart"),
    ):
        f = found[name]
        sizes = (
            f"{f['peak_mb']:>9.0f} {f['mb']:>8.0f} {f['anonymous_mb']:>10.0f} {f['files']:>6.0f}"
        )
        print(f"{label:<52} {f['all_seconds']:>10.2f} s {f['seconds']:>7.3f} s {sizes}")
    print(
        f"an interpreter alone has {bare['python']:.0f} MB, with numpy {bare['numpy']:.0f} "
        f"MB; growth is the peak beyond the imports\n"
    )
    print(f"{'samples/s':<34} {'this project':>13} {'one by one':>11} {'megatron-core':>14}")
    for seq_length in (2048, 4096):
        f = found[f"read_{seq_length}"]
        print(
            f"{f'reading, sequence {seq_length}':<34} {f['ours']:>13,.0f} "
            f"{f['ours_single']:>11,.0f} {f['megatron']:>14,.0f}"
        )
    f = found["load"]
    workers = ", ".join(f"{f[f'megatron_{n}']:,.0f}" for n in (0, 1, 2))
    print(
        f"{'loader, sequence 2048':<34} {f['ours']:>13,.0f} {'':>11} {workers} (0, 1, 2 workers)\n"
    )
    for count in (4, 100):
        f = found[f"locate_{count}"]
        print(
            f"locate 1,024 of 10**11, {count} domains: worst {f['worst']:.1f} ms, median "
            f"{f['median']:.1f} ms, first call {f['first']:.1f} ms"
        )
    print(
        f"packing of conversations: {found['pack']['first']:.2f} s, from its file "
        f"{found['pack']['again']:.2f} s"
    )


def summary(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figures that are promised."""
    ours, first, restart = found["ours_7"], found["megatron_first"], found["megatron_restart"]
    reads = {seq_length: found[f"read_{seq_length}"] for seq_length in (2048, 4096)}
    return {
        "open_seconds": found["ours_9"]["all_seconds"],
        "open_mb": found["ours_9"]["peak_mb"] - found["bare"]["python"],
        "open_seconds_1e6": found["ours_6"]["all_seconds"],
        "open_mb_1e6": found["ours_6"]["peak_mb"] - found["bare"]["python"],
        "open_ratio": first["seconds"] / ours["seconds"],
        "memory_ratio": first["mb"] / ours["mb"],
        "open_ratio_restart": restart["seconds"] / ours["seconds"],
        "memory_ratio_restart": restart["mb"] / ours["mb"],
        "read_ratio_2048": reads[2048]["ours"] / reads[2048]["megatron"],
        "read_ratio_4096": reads[4096]["ours"] / reads[4096]["megatron"],
        "single_ratio_2048": reads[2048]["ours_single"] / reads[2048]["megatron"],
        "loader_ratio_2048": found["load"]["ours"]
        / max(found["load"][f"megatron_{workers}"] for workers in (0, 1, 2)),
        "locate_ms_4": found["locate_4"]["worst"],
        "locate_ms_100": found["locate_100"]["worst"],
        "pack_seconds": found["pack"]["first"],
        "pack_seconds_again": found["pack"]["again"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="a hundredth of the sizes, one round: to see that it works, not to quote",
    )
    parser.add_argument("--part", nargs=2, metavar=("NAME", "ARGUMENTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part[0]](*json.loads(args.part[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="data_plane_") as folder:
        found = measure(folder, 100 if args.short else 1, 1 if args.short else 3)
    show(found)
    print(json.dumps({name: round(value, 4) for name, value in summary(found).items()}))


if __name__ == "__main__":
    main()
