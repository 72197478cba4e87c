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
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_plane_parts import PARTS


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
