"""``chatflow preflight --time`` and ``--search``: step times predicted for a named accelerator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.cli.preflight_checks import check_layers, find_vocab_size
from megatron_chatflow.config import Config, nearest, resolve
from megatron_chatflow.config.loader import convert
from megatron_chatflow.config.schema import section_of, sections
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.accelerators import Accelerator
from megatron_chatflow.planner.layout_search import RankedLayout, search_layouts
from megatron_chatflow.planner.memory import RESERVE
from megatron_chatflow.planner.step_settings import PRECISIONS, step_settings_of
from megatron_chatflow.planner.step_time import (
    DEFAULT_FACTOR,
    EXPECTED_ERROR,
    StepTime,
    calibration_factor,
    predict_step,
)
from megatron_chatflow.utils.user_files import load_yaml

_RATE = "tokens_per_sec"


@dataclass(frozen=True)
class MeasuredRate:
    """What ``--calibrate`` gives: a rate, and how its run differed from the configuration."""

    tokens_per_sec: float
    world_size: int | None
    settings: Mapping[str, Any]


def parse_calibration(words: Sequence[str]) -> MeasuredRate:
    """Read the words of ``--calibrate``.

    Raises:
        ConfigError: a word is not KEY=VALUE, its key is unknown, or the rate is missing or not a
            positive number.
    """
    values: dict[str, Any] = {}
    known = (_RATE, "gpus", *section_of())
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"calibrate: {word!r} is not KEY=VALUE with a known key"
                f"{nearest(key, known) or '; the keys are tokens_per_sec, gpus and settings'}"
            )
        value = load_yaml(text)
        try:
            values[key] = (
                convert(key, value, dict(sections())[section_of()[key]])
                if key in section_of()
                else value
            )
        except ConfigError as error:
            raise ConfigError(f"calibrate: {error}") from None
    rate, gpus = values.pop(_RATE, None), values.pop("gpus", None)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise ConfigError(
            f"calibrate: tokens_per_sec is {rate!r}, not a positive number; give the tokens per "
            "second of all GPUs of the measured run, e.g. tokens_per_sec=90000"
        )
    if gpus is not None and (not isinstance(gpus, int) or gpus < 1):
        raise ConfigError(f"calibrate: gpus is {gpus!r}, not a positive integer; give gpus=N")
    return MeasuredRate(float(rate), gpus, values)


def add_step_time(
    config: Config,
    vocab_size: int,
    accelerator: Accelerator,
    measured: MeasuredRate | None,
    result: dict[str, Any],
) -> None:
    """Fill in `time` of the result of ``preflight``, and the note about its error."""
    world_size = result["world_size"]
    factor = _factor(config, vocab_size, accelerator, measured, world_size)
    step = step_settings_of(resolve(config, world_size), vocab_size, world_size)
    time = predict_step(step, accelerator, factor)
    result["time"] = {
        "accelerator": accelerator.name,
        "precision": step.precision,
        "peak": PRECISIONS[step.precision].peak,
        **_numbers(time),
        "parts": dict(time.parts),
        **_error(measured),
        "factor": factor,
    }
    if tokens := (result.get("run") or {}).get("tokens"):
        result["time"]["run_hours"] = tokens / time.tokens_per_second / 3600
    result["notes"].append(_note(measured, factor))


def search(
    config: Config,
    accelerator: Accelerator,
    measured: MeasuredRate | None,
    result: dict[str, Any],
) -> tuple[str, list[str]]:
    """Fill in `search` of the result of ``preflight``; return the verdict and its reason.

    Raises:
        ConfigError: the vocabulary or the global batch is unknown, or the measured step cannot be.
    """
    world_size, gpu = result["world_size"], result["gpu_memory_gib"]
    check_layers(config)
    vocab_size, refusals = find_vocab_size(config, [])
    if vocab_size is None:
        raise ConfigError(refusals[0])
    factor = _factor(config, vocab_size, accelerator, measured, world_size)
    found = search_layouts(config, vocab_size, world_size, accelerator, gpu, factor=factor)
    result["search"] = {
        "accelerator": accelerator.name,
        "global_batch_size": config.training.global_batch_size,
        "seq_length": config.data.seq_length,
        "examined": found.examined,
        "layouts": [_row(layout) for layout in found.layouts],
        **_error(measured),
        "factor": factor,
    }
    result["notes"] += [
        _note(measured, factor),
        "context parallelism is not searched: this trainer has none; sequence_parallel is on "
        "where tensor_model_parallel_size is more than 1",
    ]
    if not found.examined:
        return "refused", [
            f"no layout of {world_size} GPUs can start"
            + (f"; one of the reasons: {found.refusal}" if found.refusal else "")
        ]
    available = f"{gpu * (1 - RESERVE):.1f} GiB ({gpu:g} without the {RESERVE:.0%} left free)"
    if not found.layouts:
        return "does not fit", [
            f"none of {found.examined:,} layouts fits {available} per GPU; the smallest needs "
            f"{found.smallest_gib:.1f}; use more GPUs or a lower --seq-length"
        ]
    best = found.layouts[0]
    return "fits", [
        f"{len(found.layouts):,} of {found.examined:,} layouts fit {available}; the fastest takes "
        f"{best.time.seconds:.3g} s per step: {_flags(best.settings)}"
    ]


def _factor(
    config: Config,
    vocab_size: int,
    accelerator: Accelerator,
    measured: MeasuredRate | None,
    world_size: int,
) -> float:
    """Return the factor of the measured step, or the default one."""
    if measured is None:
        return DEFAULT_FACTOR
    world_size = measured.world_size or world_size
    try:
        ran = resolve(config.replace(**measured.settings), world_size)
    except ConfigError as error:
        raise ConfigError(
            f"calibrate: the measured run cannot have had these settings: {error}; add what "
            "differed, e.g. gpus=8 tensor_model_parallel_size=8"
        ) from None
    step = step_settings_of(ran, vocab_size, world_size)
    return calibration_factor(step, accelerator, step.tokens / measured.tokens_per_sec)


def _numbers(time: StepTime) -> dict[str, float]:
    values = dataclasses.asdict(time)
    del values["parts"]
    return values


def _row(layout: RankedLayout) -> dict[str, Any]:
    return {
        **layout.settings,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "data_parallel_size": layout.data_parallel_size,
        "memory_gib": layout.memory_gib,
        **_numbers(layout.time),
        "flags": _flags(layout.settings),
    }


def _flags(settings: Mapping[str, Any]) -> str:
    """Return the settings as flags of ``chatflow train``; those that are off are left out."""
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            listed = value if isinstance(value, list) else [value]
            words += [flag, *map(str, listed)]
    return " ".join(words)


def _error(measured: MeasuredRate | None) -> dict[str, Any]:
    mean, worst = EXPECTED_ERROR["calibrated" if measured else "not calibrated"]
    return {"calibrated": measured is not None, "expected_error": {"mean": mean, "worst": worst}}


def _note(measured: MeasuredRate | None, factor: float) -> str:
    """Return how far the predicted times can be trusted."""
    error = _error(measured)["expected_error"]
    how = (
        f"calibrated by one measured step (factor {factor:.2f}); other layouts were not run on a "
        "GPU"
        if measured
        else f"not run on a GPU, from data sheets and a factor of {factor:.2f}; --calibrate takes "
        "a measured step"
    )
    return (
        f"step times are predicted: {how}. On published steps the error was {error['mean']:.0%} "
        f"on average and {error['worst']:.0%} at most (benchmarks/step_time.py)"
    )
