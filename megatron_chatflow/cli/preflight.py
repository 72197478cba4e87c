"""``chatflow preflight``: a cluster configuration checked without the cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_chatflow.cli.preflight_checks import check_layers, examine
from megatron_chatflow.cli.preflight_time import add_step_time, parse_calibration, search
from megatron_chatflow.config import CommandParser, ResolvedConfig, make_parser, parse, resolve
from megatron_chatflow.config.arguments import positive_float, positive_int
from megatron_chatflow.errors import ChatflowError, messages_of
from megatron_chatflow.planner.accelerators import find_accelerator
from megatron_chatflow.planner.memory import GIB, RESERVE, memory_advice
from megatron_chatflow.report import console
from megatron_chatflow.report.preflight_table import preflight_table

EPILOG = """examples:
  {call} --config examples/llama2_70b_preflight.yaml --world-size 512
  {call} --config run.yaml --world-size 64 --gpu-memory-gib 141 --json
  {call} --config run.yaml --gpus 64 --time --accelerator H200-SXM
  {call} --config run.yaml --gpus 64 --search --accelerator H200-SXM

exit codes: 0 fits, 1 does not fit into the memory of a GPU, 2 refused: the run would not start
"""
_EXIT = {"fits": 0, "does not fit": 1, "refused": 2}
_GPU_MEMORY_GIB = 80.0


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "chatflow preflight",
        "Check a cluster configuration without the cluster: settings, every rank's model, memory, "
        "batches and corpora; predict the time of a step; rank layouts.",
        EPILOG,
        command="preflight",
    )
    parser.add_argument(
        "--world-size",
        "--gpus",
        type=positive_int,
        required=True,
        metavar="N",
        help="processes (GPUs) of the job",
    )
    parser.add_argument(
        "--gpu-memory-gib",
        type=positive_float,
        metavar="X",
        help="memory of one GPU in GiB. Default: that of --accelerator, else 80.",
    )
    parser.add_argument(
        "--accelerator", metavar="NAME", help="GPU of the cluster, e.g. H100-SXM or GB200-NVL72"
    )
    parser.add_argument(
        "--time", action="store_true", help="predict the time of a step; needs --accelerator"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank the layouts that fit by predicted step time, in place of checking one layout; "
        "needs --accelerator",
    )
    parser.add_argument(
        "--calibrate",
        nargs="+",
        metavar="KEY=VALUE",
        help="a measured step on this accelerator, in this precision. tokens_per_sec=X of the job, "
        "and what differed from this configuration: gpus=N, or any setting by its name",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    parser.check = _check
    return parser


def _check(args: argparse.Namespace) -> Iterator[str]:
    """Yield what is wrong with the command's own flags."""
    if args.accelerator is None:
        for flag in ("time", "search"):
            if getattr(args, flag):
                yield f"--{flag} needs the GPU; give --accelerator NAME"
    if args.calibrate and not (args.time or args.search):
        yield "--calibrate has no effect without --time or --search; add one of them"


def main(argv: Sequence[str]) -> int:
    """Print the table and the verdict; returns 0 (fits), 1 (does not fit) or 2 (refused)."""
    config, args = parse(parser(), argv)
    accelerator = find_accelerator(args.accelerator) if args.accelerator else None
    measured = parse_calibration(args.calibrate) if args.calibrate else None
    memory = args.gpu_memory_gib or (accelerator.memory_gib if accelerator else _GPU_MEMORY_GIB)
    result: dict[str, Any] = {
        "world_size": args.world_size,
        "gpu_memory_gib": memory,
        "notes": [],
    }
    try:
        if args.search and accelerator:
            verdict, reasons = search(config, accelerator, measured, result)
        else:
            resolved = resolve(config, args.world_size)
            check_layers(resolved)
            vocab_size, reasons = examine(resolved, args.world_size, result)
            if args.time and accelerator and vocab_size is not None:
                add_step_time(config, vocab_size, accelerator, measured, result)
            verdict, reasons = ("refused", reasons) if reasons else _fit(resolved, result)
    except ChatflowError as error:
        verdict, reasons = "refused", list(messages_of(error))
    result |= {"verdict": verdict, "reasons": reasons}
    console.say(json.dumps(result, ensure_ascii=False) if args.json else preflight_table(result))
    return _EXIT[verdict]


def _fit(config: ResolvedConfig, result: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the verdict on memory, and its reason."""
    fullest = max(result["stages"], key=lambda stage: stage["total"])
    gpu, needed = result["gpu_memory_gib"], fullest["total"] / GIB
    available = gpu * (1 - RESERVE)
    reserve = f"{RESERVE:.0%} are left to CUDA, NCCL and fragmentation"
    reason = (
        f"stage {fullest['stage']} needs {needed:.1f} GiB per GPU and has {available:.1f} of "
        f"{gpu:g} ({reserve})"
    )
    if needed <= available:
        return "fits", [reason]
    activations = (fullest["activations"] + fullest["logits"]) / fullest["total"]
    return "does not fit", [
        f"{reason}; {memory_advice(config, result['layout']['data'], activations)}"
    ]
