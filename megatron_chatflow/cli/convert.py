"""The command line of `tools/convert_checkpoint.py`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_chatflow.cli.run_command import run_command
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.utils.files import disk_errors

PROG = "convert_checkpoint.py"

DESCRIPTION = """Weights of the LLaMA family (LLaMA 2 and 3, Mistral, SmolLM2, Qwen2) from Hugging Face to a run directory of this project, and back.

Which way follows from --load-dir: a folder with config.json and safetensors becomes a run directory (for `train --load RUN --finetune`,
`evaluate` and `generate`); a run directory becomes a folder that transformers loads. The checkpoint is for any tensor and pipeline size.
Tensors pass one at a time, on the CPU, in the type that they have."""

EPILOG = """examples:
  python tools/convert_checkpoint.py --load-dir SmolLM2-135M --save-dir runs/smollm2
  python tools/convert_checkpoint.py --load-dir SmolLM2-135M --save-dir runs/smollm2-zh --tokenizer-folder smollm2-zh-tokenizer --new-rows mean
  python tools/convert_checkpoint.py --load-dir runs/zh --ckpt-step 2000 --save-dir SmolLM2-135M-zh
  python tools/convert_checkpoint.py --load-dir runs/zh --average-checkpoints 6 --save-dir SmolLM2-135M-zh
  python tools/convert_checkpoint.py --load-dir runs/zh --use-ema --save-dir SmolLM2-135M-zh

exit codes: 0 converted, 1 nothing converted because a disk failed, 2 nothing converted because the folders or the flags are wrong,
130 interrupted
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; `{PROG} --help` lists the flags")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    return run_command(PROG, lambda: _convert(list(sys.argv[1:] if argv is None else argv)))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=PROG,
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        help="run directory, or Hugging Face folder; must not be there yet",
    )
    parser.add_argument(
        "--ckpt-step",
        type=int,
        metavar="N",
        help="of a run directory: the iteration to convert. Default: the latest.",
    )
    parser.add_argument(
        "--average-checkpoints",
        type=int,
        default=1,
        metavar="N",
        help=(
            "of a run directory: convert the mean of the weights of the last N checkpoints (up "
            "to --ckpt-step). Default: 1."
        ),
    )
    parser.add_argument(
        "--use-ema",
        action="store_true",
        help=(
            "of a run directory with --ema-decay: convert the running mean of the weights in "
            "place of the weights"
        ),
    )
    parser.add_argument(
        "--tokenizer-folder",
        type=Path,
        metavar="DIR",
        help="to a run directory: an extended tokenizer (tools/extend_tokenizer.py), with whose "
        "token_map.json the new rows are made; to "
        "Hugging Face: where the tokenizer's files come from. Default: the model's, or the "
        "run's, own.",
    )
    for flag, what in (("--new-rows", "rows of new tokens in embedding and output layer"), ("--new-input-rows", "those of the embedding alone"),
                       ("--new-output-rows", "those of the output layer alone")):  # fmt: skip
        parser.add_argument(
            flag,
            choices=_METHODS,
            help=(
                f"{what}: mean of the pieces' rows, random, or mean_all, the mean of all. "
                f"Default: mean."
            ),
        )
    arguments, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.split("=")[0]
        raise ConfigError(
            f"{flag}: {_REFUSED[flag]}"
            if flag in _REFUSED
            else f"unknown argument {word!r}; `{PROG} --help` lists the flags"
        )
    return arguments


def _convert(argv: list[str]) -> int:
    arguments = _parse(argv)
    load, save, begin = arguments.load_dir, arguments.save_dir, time.perf_counter()
    methods = {
        "input": arguments.new_input_rows or arguments.new_rows,
        "output": arguments.new_output_rows or arguments.new_rows,
    }
    is_run, is_hugging_face = map(os.path.isfile, (load / "config.yaml", load / "config.json"))
    if is_run == is_hugging_face:
        raise ConfigError(
            f"--load-dir {load} has neither config.json (Hugging Face) nor config.yaml (a "
            f"run directory); give one of the two"
        )
    if is_run and any(methods.values()):
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
    from megatron_chatflow.checkpoint.lease import Lease
    from megatron_chatflow.conversion.safetensors_io import check_target
    from megatron_chatflow.distributed.process_groups import hide_engine_warnings

    hide_engine_warnings()
    check_target(save)
    with disk_errors(save), Lease.beside(save, "save-dir") as lease:
        lease.acquire(_say)
        use = _write(arguments, methods, is_run)
    _say(f"{save}: written in {time.perf_counter() - begin:.1f} s; {use}")
    return 0


def _write(arguments: argparse.Namespace, methods: dict[str, str | None], is_run: bool) -> str:
    """Convert; returns how the result is used."""
    load, save = arguments.load_dir, arguments.save_dir
    if is_run:
        from megatron_chatflow.checkpoint.selection import choose_weights
        from megatron_chatflow.conversion import export_hf

        chosen = choose_weights(
            load, arguments.ckpt_step, arguments.average_checkpoints, arguments.use_ema
        )
        export_hf.convert(load, save, chosen, arguments.tokenizer_folder, _say)
        return f"transformers: AutoModelForCausalLM.from_pretrained({str(save)!r})"
    from megatron_chatflow.conversion import import_hf

    import_hf.convert(load, save, arguments.tokenizer_folder, methods, _say)
    return f"chatflow train --config {save}/config.yaml --load {save} --finetune ..."


def _say(text: str) -> None:
    print(text, flush=True)
