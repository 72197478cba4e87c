"""What saving costs the training: an asynchronous save beside a synchronous one, of the same model on the same disk.

    python benchmarks/checkpoint.py                 # a table, then one JSON object
    python benchmarks/checkpoint.py --rounds 3      # quicker

A LLaMA-style model of about 100 million parameters is trained in float32 on one thread, with its optimizer state 1.2 GB a checkpoint. A synchronous
save costs the time until it is published. An asynchronous one costs what the steps and the calls from its beginning until it is published take longer
than as many steps just before and after: the start of the writers, steps that are slowed down by them, and publishing. The two take turns; medians
are compared. Steps are also timed while another process does nothing but count: what that costs them is this machine's, not the save's.
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
HIDDEN, LAYERS, VOCAB, SEQ, BATCH = 768, 10, 16384, 128, 2
WORDS = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 12 --ffn-hidden-size 2048 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights "
    f"--seq-length {SEQ} --micro-batch-size {BATCH} --global-batch-size {BATCH} --train-iters 1000 --lr 1e-4"
)


def trainer(settle: Callable[[], None]) -> tuple[Callable[[], None], Callable[[], dict[str, Any]], int]:
    """(one training step, the sharded state of a checkpoint, parameters). Each step calls `settle` before it changes what a checkpoint holds."""
    from megatron_chatflow.config import make_parser, parse, resolve
    from megatron_chatflow.engine import distributed
    from megatron_chatflow.engine.launch import Launch

    config = resolve(parse(make_parser("chatflow train", ""), WORDS.split())[0], 1)
    distributed.initialize(Launch("single", 0, 1, 0, None, None), config.parallel, LAYERS)
    import numpy as np
    import torch
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    from megatron_chatflow.model.forward import make_forward_step, schedule_shape
    from megatron_chatflow.model.gpt import build_model, count_parameters
    from megatron_chatflow.training.checkpoint import sharded_state
    from megatron_chatflow.training.optimizer import build_optimizer, build_scheduler
    from megatron_chatflow.training.step import seed_iteration, train_step

    torch.set_num_threads(1)
    init_num_microbatches_calculator(0, None, BATCH, BATCH, 1)
    seed_iteration(1, 0)
    model = build_model(config, VOCAB, "local")
    optimizer = build_optimizer(config, model)
    build_scheduler(config, optimizer)
    forward_step = make_forward_step(1, torch.ones(VOCAB, dtype=torch.int64), False)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ + 1))
    batch = {
        "tokens": tokens[:, :-1].copy(),
        "labels": tokens[:, 1:].copy(),
        "loss_mask": np.ones((BATCH, SEQ), np.float32),
        "position_ids": np.tile(np.arange(SEQ), (BATCH, 1)),
        "segment_ids": np.zeros((BATCH, SEQ), np.int32),
        "domain": np.zeros(BATCH, np.int64),
    }

    def step() -> None:
        train_step(
            forward_step, model, optimizer, [batch], schedule_shape(SEQ, BATCH, False), 1, torch.device("cpu"), check_finite=True, settle=settle
        )

    return step, lambda: sharded_state(model, optimizer, None), count_parameters(config, VOCAB)


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def count(stop: Any) -> None:
    """Keep a core busy with nothing, as the writers do at the lowest priority, until told to stop."""
    os.nice(19)
    while not stop.is_set():
        sum(range(10**6))


def beside_counting(step: Callable[[], None], steps: int) -> list[float]:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="saves of each kind (default 12, six minutes)")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    from megatron_chatflow.engine import cpu, distributed

    distributed.hide_engine_warnings()
    cpu.install()
    from megatron_chatflow.training.saver import Saver

    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.folder))
    saver = Saver(folder, most_recent_k=1)  # before there are weights, as in a run
    step, state, parameters = trainer(saver.settle)
    results: dict[str, list[float]] = {"step": [], "synchronous": [], "call": [], "asynchronous": [], "beside counting": []}
    try:
        for _ in range(2):
            step()
        for i in range(args.rounds + 1):
            begin = time.perf_counter()
            saver.begin(2 * i + 1, state(), {})
            saver.poll(wait=True)
            synchronous = time.perf_counter() - begin
            around = [seconds(step) for _ in range(3)]
            call = seconds(lambda i=i: saver.begin(2 * i + 2, state(), {}))
            begin, made, saved = time.perf_counter(), 0, None
            while saved is None:
                step()
                made += 1
                saved = saver.poll()
            took = time.perf_counter() - begin
            plain = statistics.mean(around + [seconds(step) for _ in range(3)])
            counting = statistics.mean(beside_counting(step, 3))
            asynchronous = call + took - made * plain
            if i:  # the first round warms up
                for name, value in zip(results, (plain, synchronous, call, asynchronous, counting), strict=True):
                    results[name].append(value)
                print(f"round {i}: step {plain:.2f} s, {counting:.2f} s beside counting; synchronous {synchronous:.2f} s; beside: call {call:.2f} s, "
                      f"{made} steps meanwhile, {saved.stall:.2f} s stood still, {asynchronous:.2f} s lost in all", flush=True)  # fmt: skip
    finally:
        saver.close()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
        distributed.shut_down()
    medians = {name: statistics.median(values) for name, values in results.items()}
    answer = {
        "parameters": parameters,
        "checkpoint_bytes": size,
        "step_seconds": round(medians["step"], 3),
        "step_seconds_beside_counting": round(medians["beside counting"], 3),
        "synchronous_stall_seconds": round(medians["synchronous"], 3),
        "asynchronous_call_seconds": round(medians["call"], 3),
        "asynchronous_stall_seconds": round(medians["asynchronous"], 3),
        "async_stall_ratio": round(medians["asynchronous"] / medians["synchronous"], 4),
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
