"""``chatflow doctor``: what this machine can run, with the reason for each answer."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Sequence

from megatron_chatflow import __version__
from megatron_chatflow.config import UsageError
from megatron_chatflow.engine.launch import read_launch
from megatron_chatflow.report import console

_PACKAGES = ("megatron-core", "torch", "transformer-engine", "numpy", "sentencepiece", "tokenizers", "tiktoken", "tensorboard", "psutil", "nltk")


def main(argv: Sequence[str]) -> int:
    """Print the table; returns 1 where training cannot run at all."""
    parser = argparse.ArgumentParser(prog="chatflow doctor", description="What this machine can run, with the reason for each answer.")
    parser.parse_args(argv)
    rows = [("megatron_chatflow", __version__, ""), ("python", platform.python_version(), sys.executable)]
    rows += [_package(name) for name in _PACKAGES]
    rows += _machine()
    rows += _launcher()
    able, engine = _engine()
    rows += engine
    width = max(len(name) for name, _, _ in rows)
    for name, value, reason in rows:
        console.say(f"{name:<{width}}  {value}" + (f"  ({reason})" if reason else ""))
    console.say("training: " + ("can run" if able else "cannot run, see above"))
    return 0 if able else 1


def _package(name: str) -> tuple[str, str, str]:
    try:
        return name, importlib.metadata.version(name), ""
    except importlib.metadata.PackageNotFoundError:
        need = {"psutil": "a checkpoint save hangs without it", "transformer-engine": "needed for FP8 and for fast layers on CUDA only"}
        return name, "missing", need.get(name, "pip install -r requirements.txt")


def _machine() -> list[tuple[str, str, str]]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = shutil.disk_usage(os.getcwd())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        ("cores", str(len(os.sched_getaffinity(0))), platform.processor() or platform.machine()),
        ("memory", f"{memory:.1f} GiB", ""),
        ("disk", f"{disk.free / 2**30:.1f} GiB free", os.getcwd()),
        ("open files", f"{soft}", f"hard limit {hard}; corpora are mapped and need none of them while they are read"),
    ]


def _launcher() -> list[tuple[str, str, str]]:
    try:
        launch = read_launch()
    except UsageError as error:
        return [("launcher", "broken", str(error))]
    told = {
        "single": "neither torchrun's nor SLURM's variables are set",
        "torchrun": "RANK and WORLD_SIZE are set",
        "slurm": "SLURM_PROCID and SLURM_NTASKS are set",
    }
    return [("launcher", launch.launcher, f"{told[launch.launcher]}; rank {launch.rank} of {launch.world_size}")]


def _engine() -> tuple[bool, list[tuple[str, str, str]]]:
    try:
        import torch
    except ImportError as error:
        return False, [("torch", "does not import", str(error))]
    cuda = torch.cuda.is_available()
    rows = [("device", "cuda" if cuda else "cpu", _devices(torch) if cuda else "torch.cuda.is_available() is False")]
    backends = [name for name, there in (("nccl", torch.distributed.is_nccl_available()), ("gloo", torch.distributed.is_gloo_available())) if there]
    rows.append(("collectives", ", ".join(backends), f"{'nccl' if cuda else 'gloo'} is used on this device"))
    from megatron_chatflow.engine import cpu, distributed

    distributed.hide_engine_warnings()
    cpu.install()
    try:
        from megatron_chatflow.model.spec import transformer_engine_reason
    except ImportError as error:
        return False, [*rows, ("megatron-core", "does not import", str(error))]
    reason = transformer_engine_reason()
    rows.append(("layers", "portable" if reason else "transformer_engine", reason or "CUDA and Transformer Engine are there"))
    fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    rows.append(("apex extension", "present" if fused else "absent", "fused_weight_gradient_mlp_cuda; not used yet"))
    missing = [name for name in ("psutil",) if importlib.util.find_spec(name) is None]
    return not missing, rows


def _devices(torch: object) -> str:
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
