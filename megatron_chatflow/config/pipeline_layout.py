"""Split the layers into pipeline stages by megatron-core's rules, without megatron-core."""

from __future__ import annotations

import re

from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.config.schema.section import flag_name
from megatron_chatflow.errors import ConfigError, ConfigErrors

_MAX_CHARACTERS = 1_000_000
"""Characters of a layout with its repetitions expanded."""


def split_layers(parallel: ParallelSettings, num_layers: int) -> list[list[range]]:
    """Return the layers (from 0) of each model chunk of each pipeline stage: ``[stage][chunk]``.

    The chunks of the stages alternate: chunk 0 of every stage comes before chunk 1 of the first.
    Raises ConfigError where the settings contradict each other or `num_layers`.
    """
    errors = parallel.split_errors()
    if errors:
        raise ConfigErrors(errors)
    if parallel.pipeline_model_parallel_layout is not None:
        sizes = _sizes_of_layout(parallel, num_layers)
    elif (
        parallel.decoder_first_pipeline_num_layers is not None
        or parallel.decoder_last_pipeline_num_layers is not None
    ):
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
    """Return the model chunks of each pipeline rank, more than 1 with the interleaved schedule."""
    return len(split_layers(parallel, num_layers)[0])


def chunk_sizes(parallel: ParallelSettings, num_layers: int) -> set[int]:
    """Return the numbers of layers of the model chunks, without 0."""
    split = split_layers(parallel, num_layers)
    return {len(chunk) for stage in split for chunk in stage} - {0}


def _sizes_of_ends(parallel: ParallelSettings, num_layers: int) -> list[list[int]]:
    """Split by the sizes of the first and the last stage."""
    first = parallel.decoder_first_pipeline_num_layers
    last = parallel.decoder_last_pipeline_num_layers
    layers, stages = num_layers - (first or 0) - (last or 0), parallel.pipeline_model_parallel_size
    middle = stages - (first is not None) - (last is not None)
    if layers < 0 or (layers > 0) != (middle > 0) or (middle and layers % middle):
        ends = {
            "decoder_first_pipeline_num_layers": first,
            "decoder_last_pipeline_num_layers": last,
        }
        given = {name: value for name, value in ends.items() if value is not None}
        raise ConfigError(
            f"num_layers: of {num_layers}, "
            f"{', '.join(f'{name} {value}' for name, value in given.items())} leaves {layers} for "
            f"{middle} other pipeline stages, which cannot have the same positive number each; "
            f"change {flag_name(next(iter(given)))}"
        )
    sizes = [[layers // middle if middle else 0] for _ in range(stages)]
    if first is not None:
        sizes[0] = [first]
    if last is not None:
        sizes[-1] = [last]
    return sizes


def _sizes_of_equal_parts(parallel: ParallelSettings, num_layers: int) -> list[list[int]]:
    """Split equally; an embedding or a loss that is accounted for takes the place of a layer."""
    stages = parallel.pipeline_model_parallel_size
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    extra = {
        "account_for_embedding_in_pipeline_split": (
            parallel.account_for_embedding_in_pipeline_split
        ),
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
    }
    total = num_layers + sum(extra.values())
    if total % stages:
        added = "".join(f" + 1 ({name})" for name, value in extra.items() if value)
        raise ConfigError(
            f"num_layers {num_layers}{added} is not a multiple of pipeline_model_parallel_size "
            f"{stages}; change one of them"
        )
    part = total // stages
    if chunk is not None and (chunk < 1 or part % chunk):
        raise ConfigError(
            f"{part} layers per pipeline stage are not a multiple of "
            f"num_layers_per_virtual_pipeline_stage {chunk}; change one of them"
        )
    sizes = [[chunk or part] * (part // chunk if chunk else 1) for _ in range(stages)]
    sizes[0][0] -= parallel.account_for_embedding_in_pipeline_split
    sizes[-1][-1] -= parallel.account_for_loss_in_pipeline_split
    return sizes


def _sizes_of_layout(parallel: ParallelSettings, num_layers: int) -> list[list[int]]:
    """Split as the layout is written."""
    name, stages = "pipeline_model_parallel_layout", parallel.pipeline_model_parallel_size
    text = _expand(parallel.pipeline_model_parallel_layout or "")
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


def _expand(text: str) -> str:
    """Expand the repetitions as megatron-core does: ``Et*2|(tt|)*2tL`` -> ``Ett|tt|tt|tL``."""
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d{1,9})", r"(.)\*(\d{1,9})"):
        if (
            sum(len(what) * int(times) for what, times in re.findall(pattern, text))
            > _MAX_CHARACTERS
        ):
            raise ConfigError(
                "pipeline_model_parallel_layout: it expands to more than a million "
                "characters; shorten it"
            )
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    return text
