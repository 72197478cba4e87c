"""The training step against Hugging Face's, side by side in one run.

    python benchmarks/train_step.py                 # a table, then one JSON object
    python benchmarks/train_step.py --rounds 3      # quicker

Both train the same LLaMA-style model (hidden 512, 8 layers, 8 heads, 4 groups, feed-forward 1408,
vocabulary 8192, sequence 512, batch 4) in bfloat16 over float32 main weights on two threads: this
project's own step, as `chatflow train --bf16` runs it, and Hugging Face's LlamaForCausalLM under
bf16 autocast with fused AdamW and clipping, which is what its Trainer does; the same again under
torch.compile. Then this project's step in float32 (`bf16_over_float32` compares tokens per second:
above 1, bf16 is faster), and with each FP8 recipe of the reference, whose time over bf16's is
`fp8_<recipe>_over_bf16`: what a rehearsal in FP8 costs. The steps take turns, round after round;
medians are compared, so a slow moment of the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.trainer import Trainer

HIDDEN, LAYERS, HEADS, GROUPS, FFN, VOCAB, SEQ, BATCH, THREADS = 512, 8, 8, 4, 1408, 8192, 512, 4, 2
WORDS = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads {HEADS} "
    f"--group-query-attention --num-query-groups {GROUPS} "
    f"--ffn-hidden-size {FFN} --swiglu --normalization RMSNorm --position-embedding-type "
    f"rope --disable-bias-linear --attention-dropout 0 "
    f"--hidden-dropout 0 --untie-embeddings-and-output-weights --seq-length {SEQ} "
    f"--micro-batch-size {BATCH} --global-batch-size {BATCH} "
    "--train-iters 1000 --lr 1e-4 --bf16 --weight-decay 0.1"
)
FP8 = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
WAYS = ("ours", "huggingface", "compiled")
OWN = ("float32", *FP8)


def ours(way: str) -> Callable[[], float]:
    """One step of this project, in bf16, in float32 or in FP8 with a recipe; returns the loss."""
    if way == "float32":
        return Trainer(WORDS.replace(" --bf16", ""), VOCAB).step
    return Trainer(
        WORDS + (f" --fp8-format {FP8[way]} --fp8-recipe {way}" if way in FP8 else ""), VOCAB
    ).step


def huggingface(compiled: bool) -> Callable[[], float]:
    """One step of Hugging Face's model as its Trainer makes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=SEQ, attn_implementation="sdpa",
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def serve(make: Callable[[], Callable[[], object]]) -> None:
    """In a child process, make a step, then for each number on standard input take that many steps
    and print their seconds.
    """
    import torch

    torch.set_num_threads(THREADS)
    step = make()
    for _ in range(2):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        print(
            json.dumps(
                {
                    "seconds": times,
                    "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
            ),
            flush=True,
        )


def matmul_peak() -> float:
    """GFLOP/s of a 2048 x 512 x 1408 bf16 product as the step makes it on the same threads, best of
    many: what the step's products could reach.
    """
    import torch

    from megatron_chatflow.distributed.bf16_matmul import mm_in_float32, uses_float32

    torch.set_num_threads(THREADS)
    product = mm_in_float32 if uses_float32() else torch.mm
    a, b = (
        torch.randn(BATCH * SEQ, HIDDEN, dtype=torch.bfloat16),
        torch.randn(HIDDEN, FFN, dtype=torch.bfloat16),
    )
    best = float("inf")
    for _ in range(100):
        begin = time.perf_counter()
        product(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * BATCH * SEQ * HIDDEN * FFN / best / 1e9


def measure(
    ways: tuple[str, ...], rounds: int, steps: int, program: str = __file__
) -> dict[str, dict[str, list[float]]]:
    """{way: {"seconds": of every step, "megabytes": peak}} with the ways taking turns; the others
    sleep meanwhile.

    `program --serve WAY` is a child process that calls `serve`.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = {
        way: subprocess.Popen([sys.executable, program, "--serve", way], **pipes) for way in ways
    }
    results: dict[str, dict[str, list[float]]] = {
        way: {"seconds": [], "megabytes": []} for way in ways
    }
    try:
        for child in children.values():
            assert child.stdout.readline().strip() == "ready"
        for way in _turns(ways, rounds):
            child = children[way]
            child.stdin.write(f"{steps}\n")
            child.stdin.flush()
            answer = json.loads(child.stdout.readline())
            results[way]["seconds"] += answer["seconds"]
            results[way]["megabytes"].append(answer["megabytes"])
    finally:
        for child in children.values():
            child.kill()
    return results


def _turns(ways: tuple[str, ...], rounds: int) -> Iterator[str]:
    for i in range(rounds):
        yield from ways if i % 2 else reversed(ways)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="turns of each way. Default: 8.")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn. Default: 4.")
    parser.add_argument("--serve", choices=(*WAYS, *OWN), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        way = args.serve
        serve(lambda: huggingface(way == "compiled") if way in WAYS[1:] else ours(way))
        return
    from megatron_chatflow.distributed.bf16_matmul import is_float32_faster
    from megatron_chatflow.distributed.kernels import describe_cpu

    print(f"CPU: {describe_cpu(is_float32_faster())}")
    results = measure(WAYS, args.rounds, args.steps) | measure(
        OWN, max(1, args.rounds // 4), args.steps
    )
    median = {way: statistics.median(r["seconds"]) for way, r in results.items()}
    memory = {way: max(r["megabytes"]) for way, r in results.items()}
    products = (
        6
        * BATCH
        * SEQ
        * (LAYERS * HIDDEN * (2 * HIDDEN + 2 * HIDDEN * GROUPS // HEADS + 3 * FFN) + HIDDEN * VOCAB)
    )
    peak = matmul_peak()
    print(f"{'':<15} {'ms a step':>10} {'tokens/s':>10} {'peak MB':>9} {'of peak':>8}")
    for way in (*WAYS, *OWN):
        rate, share = BATCH * SEQ / median[way], products / median[way] / 1e9 / peak
        print(
            f"{'FP8 ' + way if way in FP8 else way:<15} {median[way] * 1e3:>10.0f} "
            f"{rate:>10.0f} {memory[way]:>9.0f} {share:>8.0%}"
        )
    print(
        f"peak: {peak:.0f} GFLOP/s in a bf16 product on {THREADS} threads; the products of "
        f"a step are {products / 1e9:.0f} GFLOP"
    )
    ratios = {
        "tokens_per_second_ratio": median["huggingface"] / median["ours"],
        "compiled_ratio": median["compiled"] / median["ours"],
        "memory_ratio": memory["huggingface"] / memory["ours"],
        "peak_share": products / median["ours"] / 1e9 / peak,
        "bf16_over_float32": median["float32"] / median["ours"],
    } | {f"fp8_{recipe}_over_bf16": median[recipe] / median["ours"] for recipe in FP8}
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
