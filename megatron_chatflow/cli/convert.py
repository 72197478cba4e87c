"""``chatflow convert``: weights from Hugging Face and back."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_chatflow.cli.run_command import run_command
from megatron_chatflow.config import CommandParser
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.utils.logging import configure_logging

DESCRIPTION = """Convert weights of the LLaMA family (LLaMA 2 and 3, Mistral, SmolLM2, Qwen2) from
Hugging Face to a run directory, or back.

The direction follows from --load-dir. A folder with config.json and safetensors becomes a run
directory, for `train --load RUN --finetune`, `evaluate` and `generate`. A run directory becomes a
folder that transformers loads. The checkpoint is for any tensor and pipeline size. Tensors are
converted one at a time, on the CPU, in the type that they have."""

EPILOG = """examples:
  {call} --load-dir SmolLM2-135M --save-dir runs/smollm2
  {call} --load-dir SmolLM2-135M --save-dir runs/smollm2-zh \\
      --tokenizer-folder smollm2-zh-tokenizer --new-rows mean
  {call} --load-dir runs/zh --ckpt-step 2000 --save-dir SmolLM2-135M-zh
  {call} --load-dir runs/zh --average-checkpoints 6 --save-dir SmolLM2-135M-zh
  {call} --load-dir runs/zh --use-ema --save-dir SmolLM2-135M-zh

exit codes: 0 converted; nothing is written at 1 (a disk failed), 2 (the folders or the flags cannot
be used) and 130 (interrupted)
"""

_METHODS = ("mean", "random", "mean_all")
_LAYOUT = (
    "a checkpoint is for every tensor and pipeline size; drop the flag, and give the sizes to "
    "the command that loads it"
)
_WAY = "which way follows from --load-dir; drop the flag"
_REFUSED = {
    "--target-tensor-parallel-size": _LAYOUT,
    "--target-pipeline-parallel-size": _LAYOUT,
    "--loader": _WAY,
    "--saver": _WAY,
    "--model-type": _WAY,
}


def parser(prog: str = "chatflow convert") -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(prog, DESCRIPTION, EPILOG)
    parser.unsupported = _REFUSED
    parser.add_argument(
        "--load-dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="Hugging Face folder, or run directory",
    )
    parser.add_argument(
        "--save-dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="run directory, or Hugging Face folder; must not exist",
    )
    parser.add_argument(
        "--ckpt-step",
        type=int,
        metavar="N",
        help="iteration of a run directory to convert. Default: the latest.",
    )
    parser.add_argument(
        "--average-checkpoints",
        type=int,
        default=1,
        metavar="N",
        help="convert the mean of the weights of the last N checkpoints of a run directory, up to "
        "--ckpt-step. Default: 1.",
    )
    parser.add_argument(
        "--use-ema",
        action="store_true",
        help="convert the running mean of the weights of a run with --ema-decay instead of the "
        "weights",
    )
    parser.add_argument(
        "--tokenizer-folder",
        type=Path,
        metavar="DIR",
        help="to a run directory: an extended tokenizer (`chatflow tokenizer extend`), whose "
        "token_map.json defines the new rows. To Hugging Face: the source of the tokenizer's "
        "files. Default: the tokenizer of the model or of the run.",
    )
    for flag, what in (
        ("--new-rows", "rows of new tokens in embedding and output layer"),
        ("--new-input-rows", "rows of new tokens in the embedding"),
        ("--new-output-rows", "rows of new tokens in the output layer"),
    ):
        parser.add_argument(
            flag,
            choices=_METHODS,
            help=f"{what}: mean of the pieces' rows, random, or mean_all, the mean of all rows. "
            "Default: mean.",
        )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "chatflow convert") -> int:
    """Convert; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(prog, lambda: _convert(parser(prog).parse(words)))


def _convert(arguments: argparse.Namespace) -> int:
    load, save, begin = arguments.load_dir, arguments.save_dir, time.perf_counter()
    is_run, is_hugging_face = map(os.path.isfile, (load / "config.yaml", load / "config.json"))
    if is_run == is_hugging_face:
        raise ConfigError(
            f"--load-dir {load} has neither config.json (Hugging Face) nor config.yaml (a "
            f"run directory); give one of the two"
        )
    rows = (arguments.new_rows, arguments.new_input_rows, arguments.new_output_rows)
    if is_run and any(rows):
        raise ConfigError("new rows are made on the way from Hugging Face only; drop --new-rows")
    for flag, given in (
        ("--ckpt-step", arguments.ckpt_step is not None),
        ("--average-checkpoints", arguments.average_checkpoints != 1),
        ("--use-ema", arguments.use_ema),
    ):
        if is_hugging_face and given:
            raise ConfigError(
                f"{load} is a Hugging Face folder, which has no iterations; drop {flag}"
            )
    from megatron_chatflow.distributed.fake_ranks import hide_devices

    hide_devices()
    configure_logging()
    from megatron_chatflow.conversion.convert import convert_from_hf, convert_to_hf

    if is_run:
        convert_to_hf(
            load,
            save,
            ckpt_step=arguments.ckpt_step,
            average_checkpoints=arguments.average_checkpoints,
            use_ema=arguments.use_ema,
            tokenizer_folder=arguments.tokenizer_folder,
        )
        use = f"transformers: AutoModelForCausalLM.from_pretrained({str(save)!r})"
    else:
        convert_from_hf(
            load,
            save,
            tokenizer_folder=arguments.tokenizer_folder,
            new_rows=arguments.new_rows,
            new_input_rows=arguments.new_input_rows,
            new_output_rows=arguments.new_output_rows,
        )
        use = f"chatflow train --config {save}/config.yaml --load {save} --finetune ..."
    print(f"{save}: written in {time.perf_counter() - begin:.1f} s; {use}", flush=True)
    return 0
