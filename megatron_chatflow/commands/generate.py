"""``chatflow generate``: text from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_chatflow.commands.common import run_values, usage_errors
from megatron_chatflow.config import UsageError, make_parser, parse, resolve
from megatron_chatflow.config.settings import PrecisionSettings
from megatron_chatflow.engine.launch import read_launch
from megatron_chatflow.report import console

EPILOG = """examples:
  chatflow generate --load runs/zh --prompt 'The file' --prompt '文件'
  chatflow generate --load runs/zh --prompt '文件' --max-new-tokens 100 --temperature 0.8 --top-k 50 --seed 7
"""


def main(argv: Sequence[str]) -> int:
    """Continue each prompt and print it."""
    parser = make_parser(
        "chatflow generate", "Continue prompts with a checkpoint, greedily or by sampling. Settings come from RUN/config.yaml.", EPILOG
    )
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="text to continue; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add at most. Default: 64.")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token (greedy); above, sample. Default: 0."
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="sample among the N likeliest tokens only; 0 among all. Default: 0.")
    with usage_errors():
        config, args = parse(parser, argv)
        if not config.checkpoint.load:
            raise UsageError("load is missing; give --load RUN, the folder that was --save of a run")
        for name in ("max_new_tokens", "temperature", "top_k"):
            if getattr(args, name) < (1 if name == "max_new_tokens" else 0):
                raise UsageError(f"{name} is {getattr(args, name)}; give --{name.replace('_', '-')} a larger number")
        config, args = parse(parser, argv, run_values(config.checkpoint.load, keep_layout=False))
        launch = read_launch()
        if launch.world_size > 1 and config.parallel.tensor_model_parallel_size != launch.world_size:
            raise UsageError(
                f"generate runs as one process or with tensor parallelism over all {launch.world_size}; give "
                f"--tensor-model-parallel-size {launch.world_size}"
            )
        if config.parallel.sequence_parallel:
            raise UsageError("generate reads prompts of any length, which sequence_parallel cannot split; drop --sequence-parallel")
        if not all(args.prompt):
            raise UsageError("a prompt is empty; give --prompt some text")
        config.precision = PrecisionSettings()  # one row of any length: FP8 layers want multiples of 8 tokens
        config = resolve(config, launch.world_size)
        from megatron_chatflow.training.inputs import open_inputs

        inputs = open_inputs(config)
        if inputs.tokenizer is None:
            raise UsageError("generate needs the tokenizer; give --tokenizer-type and --tokenizer-model")
    from megatron_chatflow.evaluation.session import open_model

    with open_model(config, launch, inputs) as session:
        from megatron_chatflow.evaluation.generate import generate

        for prompt in args.prompt:
            ids = inputs.tokenizer.encode(prompt)
            new = generate(session, ids, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, seed=config.training.seed)
            if launch.rank == 0:
                console.say(inputs.tokenizer.decode(ids + new))
    return 0
