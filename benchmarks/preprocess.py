#!/usr/bin/env python3
"""How fast text becomes .bin/.idx: this project's command, the raw tokenizer, and a pool that takes
one document at a time.

    python benchmarks/preprocess.py            # two cores, less than six minutes

The input is made of the sample corpora of the quickstart, whose lines are put in a new order each
time they come round, and the tokenizer is the quickstart's. Side by side, in turns, medians:

- `command`: tools/preprocess_data.py on all cores, from JSON lines on the disk to .bin/.idx on the
  disk, start-up included;
- `tokenizer`: SentencePiece's own `encode(batch, num_threads=cores)` on texts that are in memory
  already, and nothing else;
- `pool`: Megatron's way: a process a core, `imap` over the lines of the file, tokens back as lists,
  written document by document.

The last line is a JSON object: `tokenizer_ratio` and `pool_ratio` are the rate of the command over
that of the other (above 1: the command is faster), `startup_seconds` the time of the command on one
document, `peak_mb` the resident memory of the command and its workers on 1 GB.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SAMPLES = ROOT / "examples" / "quickstart"
MODEL = SAMPLES / "tokenizer.model"
CORES = len(os.sched_getaffinity(0))
BATCH = 200
POOL_CHUNK = 32
MB = 1e6


def write_input(path: Path, size: int) -> None:
    """Writes about `size` bytes of JSON lines: the samples' documents, their lines in another order
    each time.
    """
    texts = [text for name in ("en", "zh") for text in texts_of(SAMPLES / "data" / f"{name}.jsonl")]
    order = random.Random(1)
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            order.shuffle(texts)
            for text in texts:
                lines = text.split("\n")
                order.shuffle(lines)
                record = json.dumps({"text": "\n".join(lines)}, ensure_ascii=False) + "\n"
                file.write(record)
                written += len(record.encode())


def texts_of(path: Path) -> list[str]:
    """The texts of a file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def command(source: Path, folder: Path) -> list[str]:
    """The command line of this project."""
    flags = [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        str(MODEL),
        "--append-eod",
        "--workers",
        str(CORES),
    ]
    return [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        "--input",
        str(source),
        "--output-prefix",
        str(folder / "command"),
        *flags,
    ]


def run_command(source: Path, folder: Path) -> float:
    """Seconds of the command."""
    begin = time.perf_counter()
    subprocess.run(command(source, folder), check=True, capture_output=True)
    return time.perf_counter() - begin


def run_tokenizer(texts: list[str]) -> float:
    """Seconds of the tokenizer on batches."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    begin = time.perf_counter()
    for start in range(0, len(texts), BATCH):
        processor.encode(texts[start : start + BATCH], num_threads=CORES)
    return time.perf_counter() - begin


def run_pool(source: Path, folder: Path) -> float:
    """Seconds of a pool that takes one document at a time."""
    from megatron_chatflow.data import IndexedDatasetBuilder, best_dtype

    size = sentencepiece.SentencePieceProcessor(model_file=str(MODEL)).vocab_size()
    begin = time.perf_counter()
    with (
        open(source, encoding="utf-8") as lines,
        multiprocessing.Pool(CORES, start_pool_worker) as pool,
        IndexedDatasetBuilder(folder / "pool", best_dtype(size)) as builder,
    ):
        for ids in pool.imap(encode_line, lines, POOL_CHUNK):
            builder.add_document(ids, [len(ids)])
        builder.finalize()
    return time.perf_counter() - begin


def start_pool_worker() -> None:
    """Loads the tokenizer in a process of the pool."""
    global processor
    processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def encode_line(line: str) -> list[int]:
    """The tokens of one line."""
    return [*processor.encode(json.loads(line)["text"]), processor.eos_id()]


def peak_memory(arguments: list[str]) -> float:
    """MB of resident memory of a command and its children together, at most."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(resident(part) for part in family(process.pid)))
        threading.Event().wait(0.05)
    if process.returncode:
        raise SystemExit(f"the command ended with exit code {process.returncode}")
    return peak / MB


def family(pid: int) -> Iterator[psutil.Process]:
    """A process and its descendants, those that still live."""
    try:
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def resident(process: psutil.Process) -> int:
    """Bytes of resident memory; 0 when the process has ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes", type=int, default=100, help="of the input of the comparison (default 100)"
    )
    parser.add_argument(
        "--memory-megabytes",
        type=int,
        default=1000,
        help="of the input whose memory is measured (default 1000)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report(folder, options.megabytes, options.memory_megabytes, options.rounds)


def report(folder: Path, megabytes: int, memory_megabytes: int, rounds: int) -> None:
    """Measures, and prints the table and the JSON object."""
    one, source = folder / "one.jsonl", folder / "input.jsonl"
    one.write_text(json.dumps({"text": "one document"}) + "\n")
    write_input(source, int(megabytes * MB))
    texts = texts_of(source)
    size = sum(len(text.encode()) for text in texts)
    seconds: dict[str, list[float]] = {"startup": [], "command": [], "tokenizer": [], "pool": []}
    for _ in range(rounds):
        seconds["startup"].append(run_command(one, folder))
        seconds["command"].append(run_command(source, folder))
        seconds["tokenizer"].append(run_tokenizer(texts))
        seconds["pool"].append(run_pool(source, folder))
    if (folder / "command_text_document.bin").read_bytes() != (folder / "pool.bin").read_bytes():
        raise SystemExit("the command and the pool wrote different tokens")
    rate = {who: size / MB / statistics.median(values) for who, values in seconds.items()}
    del texts
    source.unlink()
    write_input(source, int(memory_megabytes * MB))
    peak = peak_memory(command(source, folder))
    print(f"{size / MB:.0f} MB of text, {CORES} cores, median of {rounds}")
    print(f"{'':12}{'seconds':>10}{'MB/s':>10}{'command is faster by':>24}")
    for who in ("command", "tokenizer", "pool"):
        print(
            f"{who:12}{statistics.median(seconds[who]):10.2f}{rate[who]:10.2f}"
            f"{rate['command'] / rate[who]:24.2f}"
        )
    print(
        f"start-up {statistics.median(seconds['startup']):.2f} s; {peak:.0f} MB resident on "
        f"an input of {memory_megabytes} MB"
    )
    result = {
        "tokenizer_ratio": round(rate["command"] / rate["tokenizer"], 3),
        "pool_ratio": round(rate["command"] / rate["pool"], 3),
        "startup_seconds": round(statistics.median(seconds["startup"]), 3),
        "peak_mb": round(peak, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
