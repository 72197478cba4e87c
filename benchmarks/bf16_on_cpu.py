"""bf16 against float32 on this CPU, in training, evaluation and generation, side by side in one
run.

    python benchmarks/bf16_on_cpu.py                 # a table, then one JSON object
    python benchmarks/bf16_on_cpu.py --rounds 2      # quicker

The model has the shape of SmolLM2-135M (30 layers, hidden 576, 9 heads, 3 groups, feed-forward
1536, vocabulary 49,152); the weights are random. Training takes steps of one sequence of 128 tokens
with AdamW, evaluation runs the forward pass of one such sequence, generation continues 32 tokens by
16 with the key-value cache. Every ratio is tokens per second in bf16 over tokens per second in
float32: at 1 the two are equally fast. The ways take turns, round after round, and medians are
compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.train_step import measure, serve
from benchmarks.trainer import Trainer

VOCAB, SEQ, PROMPT, NEW = 49152, 128, 32, 16
WORDS = (
    "--num-layers 30 --hidden-size 576 --num-attention-heads 9 --group-query-attention "
    "--num-query-groups 3 --ffn-hidden-size 1536 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0 "
    f"--seq-length {SEQ} --micro-batch-size 1 --global-batch-size 1 --train-iters 1000 --lr 1e-4"
)
TASKS = {"training": SEQ, "evaluation": SEQ, "generation": NEW}
"""The tokens of one step of each."""
TYPES = ("bf16", "float32")


def make(way: str) -> Callable[[], object]:
    """One step of a task in a type, named ``task_type``."""
    task, dtype = way.split("_")
    trainer = Trainer(WORDS + (" --bf16" if dtype == "bf16" else ""), VOCAB)
    if task == "training":
        return trainer.step
    import torch

    from megatron_chatflow.data.chat.prompts import Prompt
    from megatron_chatflow.evaluation.decoding import Sampling, decode
    from megatron_chatflow.evaluation.model_session import ModelSession
    from megatron_chatflow.model.gpt import build_model
    from megatron_chatflow.tokenizer import load_tokenizer

    model = build_model(trainer.config, VOCAB, "local", wrap=False)
    for chunk in model:
        chunk.eval()
    device = torch.device("cpu")
    if task == "generation":
        session = ModelSession(trainer.config, VOCAB, "local", model, device)
        tokenizer = load_tokenizer("NullTokenizer", vocab_size=VOCAB - 1)
        prompt = Prompt({}, list(range(PROMPT)), frozenset())
        return lambda: decode(session, tokenizer, [prompt], NEW, Sampling())
    return lambda: trainer.evaluate(model)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns of each way. Default: 4.")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn. Default: 3.")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda: make(args.serve))
        return
    from megatron_chatflow.distributed.bf16_matmul import is_float32_faster
    from megatron_chatflow.distributed.kernels import describe_cpu

    print(f"CPU: {describe_cpu(is_float32_faster())}")
    print(f"{'tokens/s':<12} {'bf16':>10} {'float32':>10} {'ratio':>8}")
    ratios = {}
    for task, tokens in TASKS.items():  # two models of the full size in memory at a time
        ways = measure(
            tuple(f"{task}_{dtype}" for dtype in TYPES), args.rounds, args.steps, __file__
        )
        rates = {
            dtype: tokens / statistics.median(ways[f"{task}_{dtype}"]["seconds"]) for dtype in TYPES
        }
        ratios[f"{task}_bf16_over_float32"] = round(rates["bf16"] / rates["float32"], 4)
        print(
            f"{task:<12} {rates['bf16']:>10.1f} {rates['float32']:>10.1f} "
            f"{rates['bf16'] / rates['float32']:>8.2f}"
        )
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
