"""The checks of ``chatflow preflight``: model, batches, corpora, disk, devices."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from megatron_chatflow.config import (
    Config,
    ResolvedConfig,
    padded_vocab_size,
    total_samples,
)
from megatron_chatflow.config.schema import PrecisionSettings
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.planner.batches import bubble, micro_batches
from megatron_chatflow.planner.memory import checkpoint_bytes, stage_memory
from megatron_chatflow.planner.parameters import Layout, layout_of

_FP8_DEVICES = {
    "delayed": "compute capability 8.9 or newer (Ada, Hopper, Blackwell)",
    "tensorwise": "compute capability 8.9 or newer (Ada, Hopper, Blackwell)",
    "blockwise": "compute capability 9.0 or newer (Hopper, Blackwell), with CUDA 12.9 or newer",
    "mxfp8": "compute capability 10 (Blackwell)",
}


def examine(
    config: ResolvedConfig, world_size: int, result: dict[str, Any]
) -> tuple[int | None, list[str]]:
    """Fill in `result`; return (size of the vocabulary, why the run would not start)."""
    layout = layout_of(config, world_size)
    vocab_size, refusals = _read_data(config, result)
    result["layout"] = {
        "tensor": layout.tp,
        "pipeline": layout.pp,
        "virtual": layout.vpp,
        "data": layout.dp,
        "sequence_parallel": config.parallel.sequence_parallel,
        "distributed_optimizer": config.parallel.use_distributed_optimizer,
    }
    count, t = micro_batches(config, layout), config.training
    tokens = t.global_batch_size * config.data.seq_length
    result["batch"] = {
        "samples": t.global_batch_size,
        "tokens": tokens,
        "micro_batches": count,
        "micro_batch_size": t.micro_batch_size,
        "bubble": bubble(layout, count),
    }
    _note_devices(config, layout, result["notes"])
    if vocab_size is not None:
        refusals = refusals + _examine_model(config, vocab_size, layout, result)
    return vocab_size, refusals


def _examine_model(
    config: ResolvedConfig, vocab_size: int, layout: Layout, result: dict[str, Any]
) -> list[str]:
    stages = [stage_memory(config, vocab_size, layout, stage) for stage in range(layout.pp)]
    result["stages"] = [dataclasses.asdict(stage) | {"total": stage.total} for stage in stages]
    begin = time.perf_counter()
    try:
        built = _build(config, vocab_size, layout)
    except (ValueError, AssertionError, NotImplementedError) as error:
        if not _raised_by_megatron_core(error):
            raise
        return [f"megatron-core does not build the model: {error}"]
    result["built"] = {"ranks": layout.tp * layout.pp, "seconds": time.perf_counter() - begin}
    _describe_run(config, vocab_size, result)
    return [
        f"the model that was built for stage {stage.stage} has {count:,} parameters on "
        f"tensor rank {rank}, and the closed form says "
        f"{stage.parameters:,}: a bug of preflight, please report it"
        for stage, counts in zip(stages, built, strict=True)
        for rank, count in enumerate(counts)
        if count != stage.parameters
    ]


def _raised_by_megatron_core(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").startswith("megatron.core")


def _build(config: ResolvedConfig, vocab_size: int, layout: Layout) -> list[list[int]]:
    """Return the parameters of every pipeline stage's tensor ranks, in one replica.

    The models are built by the code that `train` runs, without FP8: without CUDA its layers would
    differ from those on the cluster, and have the same parameters.
    """
    from megatron_chatflow.distributed.fake_ranks import hide_devices, rehearse

    hide_devices()
    from megatron_chatflow.distributed.process_groups import hide_engine_warnings

    hide_engine_warnings()
    from megatron_chatflow.model.gpt import build_model

    plain = dataclasses.replace(config, precision=PrecisionSettings())
    counts = []
    for rank in range(layout.tp * layout.pp):
        with rehearse(rank, layout.tp * layout.pp, config.parallel, config.model.num_layers):
            chunks = build_model(plain, vocab_size, "local", wrap=False)
        counts.append(
            sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        )
    return [counts[stage * layout.tp : (stage + 1) * layout.tp] for stage in range(layout.pp)]


def _describe_run(config: ResolvedConfig, vocab_size: int, result: dict[str, Any]) -> None:
    from megatron_chatflow.planner.parameters import count_parameters, flops_per_token
    from megatron_chatflow.training.batch_schedule import batch_history, count_iterations

    padded, p, c = padded_vocab_size(config, vocab_size), config.precision, config.checkpoint
    precision = (
        f"FP8 {p.fp8_format} ({p.fp8_recipe}) and bf16"
        if p.fp8_format
        else "bf16"
        if config.training.bf16
        else "float32"
    )
    result["model"] = {
        "parameters": count_parameters(config, vocab_size),
        "vocab_size": vocab_size,
        "padded_vocab_size": padded,
        "precision": precision,
    }
    samples = (result.get("data") or {}).get("samples", total_samples(config))
    iterations, tokens = (
        count_iterations(batch_history(config), samples),
        samples * config.data.seq_length,
    )
    result["run"] = {
        "iterations": iterations,
        "samples": samples,
        "tokens": tokens,
        "flops": tokens * flops_per_token(config, vocab_size),
    }
    size = checkpoint_bytes(config, count_parameters(config, padded))
    count = -(-iterations // c.save_interval) if c.save_interval else 1
    result["checkpoint"] = {"bytes": size, "count": count if c.save else 0}
    _note_disk(c.save, result["checkpoint"], result["notes"])


def _read_data(config: ResolvedConfig, result: dict[str, Any]) -> tuple[int | None, list[str]]:
    """Fill in `data`; return (size of the vocabulary or None, why the corpora cannot be used)."""
    from megatron_chatflow.curriculum import check_exhaustion, forecast
    from megatron_chatflow.training.data_setup import check_tokens, make_plan, open_inputs

    if not (config.data.curriculum or config.data.data_path):
        result["notes"].append(
            "no corpus was checked: neither --curriculum nor --data-path is given"
        )
        return find_vocab_size(config, [])
    try:
        inputs = open_inputs(config, held_out=bool(config.validation.eval_interval))
    except ChatflowError as error:
        return find_vocab_size(config, _corpus_errors(config) or [str(error)])
    result["notes"] += inputs.notes
    result["notes"].append(_files_note(len(inputs.domains)))
    try:
        result["notes"].append(check_tokens(inputs))
        plan = make_plan(config, inputs.curriculum, inputs.epoch_samples)
        outlook = forecast(plan, inputs.epoch_samples)
        result["notes"] += outlook.warnings
        domains = [
            {"name": d.name, "samples": d.samples, "epochs": d.epochs} for d in outlook.domains
        ]
        result["data"] = {"samples": outlook.end, "domains": domains}
        check_exhaustion(plan, inputs.epoch_samples)
    except ChatflowError as error:
        return inputs.vocab_size, [str(error)]
    return inputs.vocab_size, []


def find_vocab_size(config: Config, refusals: list[str]) -> tuple[int | None, list[str]]:
    """Return the size as given, or the tokenizer's, and the refusals with those found here."""
    from megatron_chatflow.tokenizer import load_tokenizer

    t = config.tokenizer
    if t.vocab_size:
        return t.vocab_size, refusals
    if not t.tokenizer_type:
        unknown = (
            "the size of the vocabulary is not known; give --vocab-size, or --tokenizer-type "
            "and --tokenizer-model"
        )
        return None, [*refusals, unknown]
    try:
        tokenizer = load_tokenizer(
            t.tokenizer_type,
            tokenizer_model=t.tokenizer_model,
            vocab_file=t.vocab_file,
            merge_file=t.merge_file,
        )
    except ChatflowError as error:
        return None, [*refusals, *([] if str(error) in refusals else [str(error)])]
    return tokenizer.vocab_size, refusals


def _corpus_errors(config: ResolvedConfig) -> list[str]:
    """Return a message per corpus of the curriculum that cannot be opened."""
    from megatron_chatflow.curriculum import load_curriculum
    from megatron_chatflow.data import open_domains

    if not config.data.curriculum:
        return []
    try:
        curriculum = load_curriculum(config.data.curriculum)
    except ChatflowError:
        return []
    errors = []
    for name, domain in curriculum.domains.items():
        try:
            open_domains(
                dataclasses.replace(curriculum, domains={name: domain}),
                seq_length=config.data.seq_length,
                seed=0,
                split=config.data.split,
            )
        except ChatflowError as error:
            errors.append(str(error))
    return errors


def _files_note(corpora: int) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"each process maps {2 * corpora} files of {corpora} corpora and keeps none of them "
        f"open (limit of open files here: {soft})"
    )


def _note_disk(save: str | None, checkpoint: dict[str, int], notes: list[str]) -> None:
    if save is None:
        notes.append("no --save: nothing of the run would be kept")
        return
    folder = next(path for path in (Path(save), *Path(save).parents) if os.path.exists(path))
    free, wanted = shutil.disk_usage(folder).free, checkpoint["count"] * checkpoint["bytes"]
    if free < wanted:
        notes.append(
            f"old checkpoints are not removed: {save} would grow to {wanted / 1e9:,.0f} GB, "
            f"and {free / 1e9:,.0f} GB are free"
        )


def check_layers(config: Config) -> None:
    """Refuse what only a machine with CUDA would refuse."""
    if config.precision.fp8_format and config.model.transformer_impl == "local":
        raise ConfigError(
            f"fp8_format {config.precision.fp8_format} needs Transformer Engine on CUDA, "
            f"and transformer_impl is local; drop --transformer-impl or "
            "--fp8-format"
        )


def _note_devices(config: ResolvedConfig, layout: Layout, notes: list[str]) -> None:
    p = config.precision
    if p.fp8_format:
        notes.append(
            f"fp8_recipe {p.fp8_recipe} needs {_FP8_DEVICES[p.fp8_recipe]} and Transformer "
            f"Engine on the cluster"
        )
    if layout.tp > 8:
        notes.append(
            f"TP {layout.tp} is more than the 8 GPUs of a usual node: every layer would "
            f"wait for the network"
        )
