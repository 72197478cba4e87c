"""Which layers each pipeline stage holds, by megatron-core's rules, without megatron-core."""

from __future__ import annotations

import re

from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.errors import ConfigError

SPLITS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""Settings of an uneven split."""

_LONGEST = 1_000_000
"""Characters of a layout, multiplied out."""


def split_layers(parallel: ParallelSettings, num_layers: int) -> list[list[range]]:
    """Layer numbers from 0 of each model chunk of each pipeline stage: ``split[stage][chunk]``.

    The chunks of all stages take turns: chunk 0 of every stage comes before chunk 1 of the first.
    Raises ConfigError where the settings contradict each other or `num_layers`.
    """
    _check_contradictions(parallel)
    if parallel.pipeline_model_parallel_layout is not None:
        sizes = _sizes_of_layout(parallel, num_layers)
    elif any(getattr(parallel, name) is not None for name in SPLITS[:2]):
        sizes = _sizes_of_ends(parallel, num_layers)
    else:
        sizes = _sizes_of_equal_parts(parallel, num_layers)
    split: list[list[range]] = [[] for _ in sizes]
    start = 0
    for chunk in range(len(sizes[0])):
        for stage, counts in enumerate(sizes):
            split[stage].append(range(start, start + counts[chunk]))
            start += counts[chunk]
    return split


def virtual_pipeline_size(parallel: ParallelSettings, num_layers: int) -> int:
    """Model chunks of each pipeline rank: more than 1 under the interleaved schedule."""
    return len(split_layers(parallel, num_layers)[0])


def chunk_sizes(parallel: ParallelSettings, num_layers: int) -> set[int]:
    """Numbers of layers that model chunks have, those without any left out."""
    split = split_layers(parallel, num_layers)
    return {len(chunk) for stage in split for chunk in stage} - {0}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_contradictions(parallel: ParallelSettings) -> None:
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    values = {name: getattr(parallel, name) for name in SPLITS}
    given = [name for name, value in values.items() if value is not None and value is not False]
    for name in [*given, *(["num_layers_per_virtual_pipeline_stage"] if chunk is not None else [])]:
        if parallel.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"{name}: it has no effect with pipeline_model_parallel_size 1; "
                f"drop {_flag(name)} or raise --pipeline-model-parallel-size"
            )
    ends = [name for name in SPLITS[:2] if name in given]
    for name in ends:
        if values[name] < 1:
            raise ConfigError(
                f"{name}: {values[name]} is not a positive number; change {_flag(name)}"
            )
        if chunk is not None:
            raise ConfigError(
                f"{name}: it contradicts num_layers_per_virtual_pipeline_stage, as stages have "
                "different sizes; drop one of them or write --pipeline-model-parallel-layout"
            )
        for other in SPLITS[2:4]:
            if other in given:
                raise ConfigError(f"{name}: it contradicts {other}; drop one of them")
    if "pipeline_model_parallel_layout" in given:
        others = [name for name in given if name != "pipeline_model_parallel_layout"]
        others += ["num_layers_per_virtual_pipeline_stage"] if chunk is not None else []
        if others:
            raise ConfigError(
                f"pipeline_model_parallel_layout: it contradicts {others[0]}, as it places every "
                "layer; drop one of them"
            )


def _sizes_of_ends(parallel: ParallelSettings, num_layers: int) -> list[list[int]]:
    first, last = (getattr(parallel, name) for name in SPLITS[:2])
    layers, stages = num_layers - (first or 0) - (last or 0), parallel.pipeline_model_parallel_size
    middle = stages - (first is not None) - (last is not None)
    ends = ((SPLITS[0], first), (SPLITS[1], last))
    given = ", ".join(f"{name} {value}" for name, value in ends if value is not None)
    flag = _flag(SPLITS[0] if first is not None else SPLITS[1])
    if layers < 0 or (layers > 0) != (middle > 0) or (middle and layers % middle):
        raise ConfigError(
            f"num_layers: of {num_layers}, {given} leaves {layers} for {middle} other pipeline "
            f"stages, which cannot have the same positive number each; change {flag}"
        )
    sizes = [[layers // middle if middle else 0] for _ in range(stages)]
    if first is not None:
        sizes[0] = [first]
    if last is not None:
        sizes[-1] = [last]
    return sizes


def _sizes_of_equal_parts(parallel: ParallelSettings, num_layers: int) -> list[list[int]]:
    """Equal parts; an embedding or a loss that is accounted for takes the place of a layer."""
    stages = parallel.pipeline_model_parallel_size
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    embedding, loss = (int(getattr(parallel, name)) for name in SPLITS[2:4])
    total = num_layers + embedding + loss
    if total % stages:
        extra = "".join(f" + 1 ({name})" for name in SPLITS[2:4] if getattr(parallel, name))
        raise ConfigError(
            f"num_layers {num_layers}{extra} is not a multiple of pipeline_model_parallel_size "
            f"{stages}; change one of them"
        )
    part = total // stages
    if chunk is not None and (chunk < 1 or part % chunk):
        raise ConfigError(
            f"{part} layers a pipeline stage are not a multiple of "
            f"num_layers_per_virtual_pipeline_stage {chunk}; change one of them"
        )
    sizes = [[chunk or part] * (part // chunk if chunk else 1) for _ in range(stages)]
    sizes[0][0] -= embedding
    sizes[-1][-1] -= loss
    return sizes


def _sizes_of_layout(parallel: ParallelSettings, num_layers: int) -> list[list[int]]:
    name, stages = "pipeline_model_parallel_layout", parallel.pipeline_model_parallel_size
    text = _multiplied_out(parallel.pipeline_model_parallel_layout or "")
    wrong = sorted(set(text) - set("EtL|"))
    if wrong:
        raise ConfigError(
            f"{name}: it has {wrong[0]!r}; write E (embedding), t (layer), L (loss), "
            "| between stages, (...)*N and x*N"
        )
    parts = text.split("|")
    if len(parts) % stages:
        raise ConfigError(
            f"{name}: it has {len(parts)} stages, not a multiple of "
            f"pipeline_model_parallel_size {stages}; change one of them"
        )
    if "" in parts:
        empty = parts.index("")
        raise ConfigError(f"{name}: stage {empty} (from 0) is empty; give each stage E, t or L")
    flat = "".join(parts)
    if flat[0] != "E" or flat[-1] != "L" or flat.count("E") != 1 or flat.count("L") != 1:
        raise ConfigError(
            f"{name}: it must start with the only E and end with the only L; change it"
        )
    count = flat.count("t")
    if count != num_layers:
        raise ConfigError(
            f"{name}: it has {count} layers (t), and num_layers is {num_layers}; change one of them"
        )
    return [[part.count("t") for part in parts[stage::stages]] for stage in range(stages)]


def _multiplied_out(text: str) -> str:
    """``Et*2|(tt|)*2tL`` -> ``Ett|tt|tt|tL``, as megatron-core does it."""
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d{1,9})", r"(.)\*(\d{1,9})"):
        if sum(len(what) * int(times) for what, times in re.findall(pattern, text)) > _LONGEST:
            raise ConfigError(
                "pipeline_model_parallel_layout: it multiplies out to more than a million "
                "characters; shorten it"
            )
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    return text
