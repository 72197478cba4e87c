"""The cost of saving to training: an asynchronous and a synchronous save of the same model.

    python benchmarks/checkpoint.py                 # a table, then one JSON object
    python benchmarks/checkpoint.py --rounds 3      # quicker

A LLaMA-style model of about 100 million parameters is trained in float32 on one thread, with its
optimizer state 1.2 GB per checkpoint. A synchronous save costs the time until it is published. An
asynchronous one costs what the steps and the calls from its beginning until it is published take
longer than as many steps just before and after: the start of the writers, steps that are slowed
down by them, and publishing. The two take turns; medians are compared. Steps are also timed while
another process does nothing but count: what that costs them is this machine's, not the save's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.trainer import Trainer

HIDDEN, LAYERS, VOCAB, SEQ, BATCH = 768, 10, 16384, 128, 2
WORDS = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 12 "
    f"--ffn-hidden-size 2048 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --untie-embeddings-and-output-weights "
    f"--seq-length {SEQ} --micro-batch-size {BATCH} --global-batch-size {BATCH} "
    f"--train-iters 1000 --lr 1e-4"
)


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def count(stop: Any) -> None:
    """Keep a core busy at the lowest priority, like the writers, until `stop` is set."""
    os.nice(19)
    while not stop.is_set():
        sum(range(10**6))


def step_next_to_counter(step: Callable[[], None], steps: int) -> list[float]:
    """Seconds of each step while another process counts."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    process = context.Process(target=count, args=(stop,))
    process.start()
    time.sleep(2)  # until it has started
    try:
        return [seconds(step) for _ in range(steps)]
    finally:
        stop.set()
        process.join()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=12, help="saves of each kind (default 12, six minutes)"
    )
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    from megatron_chatflow.distributed import cuda_shim, process_groups

    process_groups.hide_engine_warnings()
    cuda_shim.install()
    import torch

    from megatron_chatflow.checkpoint.saver import Saver
    from megatron_chatflow.checkpoint.state_dict import sharded_state

    torch.set_num_threads(1)

    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.folder))
    saver = Saver(folder, most_recent_k=1)  # before there are weights, as in a run
    trainer = Trainer(WORDS, VOCAB)

    def step() -> None:
        trainer.step(saver.settle)

    def begin_to_save(iteration: int) -> None:
        saver.begin(iteration, sharded_state(trainer.model, trainer.optimizer, None), {})

    results: dict[str, list[float]] = {
        "step": [],
        "synchronous": [],
        "call": [],
        "asynchronous": [],
        "next to counter": [],
    }
    try:
        for _ in range(2):
            step()
        for i in range(args.rounds + 1):
            begin = time.perf_counter()
            begin_to_save(2 * i + 1)
            saver.poll(wait=True)
            synchronous = time.perf_counter() - begin
            around = [seconds(step) for _ in range(3)]
            call = seconds(lambda i=i: begin_to_save(2 * i + 2))
            begin, made, saved = time.perf_counter(), 0, None
            while saved is None:
                step()
                made += 1
                saved = saver.poll()
            took = time.perf_counter() - begin
            plain = statistics.mean(around + [seconds(step) for _ in range(3)])
            counting = statistics.mean(step_next_to_counter(step, 3))
            asynchronous = call + took - made * plain
            if i:  # the first round warms up
                for name, value in zip(
                    results, (plain, synchronous, call, asynchronous, counting), strict=True
                ):
                    results[name].append(value)
                print(f"round {i}: step {plain:.2f} s, {counting:.2f} s next to a counter; "
                    f"synchronous {synchronous:.2f} s; asynchronous: call {call:.2f} s, "
                      f"{made} steps meanwhile, {saved.stall:.2f} s stood still, "
                          f"{asynchronous:.2f} s lost in all", flush=True)  # fmt: skip
    finally:
        saver.close()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
        process_groups.shut_down()
    medians = {name: statistics.median(values) for name, values in results.items()}
    answer = {
        "parameters": trainer.parameters,
        "checkpoint_bytes": size,
        "step_seconds": round(medians["step"], 3),
        "step_seconds_next_to_counter": round(medians["next to counter"], 3),
        "synchronous_stall_seconds": round(medians["synchronous"], 3),
        "asynchronous_call_seconds": round(medians["call"], 3),
        "asynchronous_stall_seconds": round(medians["asynchronous"], 3),
        "async_stall_ratio": round(medians["asynchronous"] / medians["synchronous"], 4),
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
