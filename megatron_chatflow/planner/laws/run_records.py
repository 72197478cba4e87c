"""What a run directory says to a scaling law: its size, its tokens and its held-out losses.

Everything is read from `config.yaml`, `metrics.jsonl`, `lineage.json` and the plain data of the
latest checkpoint, so a run that is still training, or was stopped, has the record of its last
validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.config import Config, ModelConfig, Schedule, load_values, resolve_model
from megatron_chatflow.errors import ChatflowError, ConfigError, DataError
from megatron_chatflow.planner.laws.run_table import RunRecord
from megatron_chatflow.planner.parameters import flops_per_token, scaling_law_parameters
from megatron_chatflow.report.metrics_file import read_records
from megatron_chatflow.utils.user_files import load_json, read_text


def records_of_run(run: Path) -> list[RunRecord]:
    """Return one record per held-out domain or validation set, of the last validation of a run.

    Args:
        run: a run directory, what was --save of a training.

    Raises:
        ConfigError: it is not a run directory, or its settings cannot be read.
        DataError: the run was not validated after its first iteration.
    """
    config = _settings(run)
    losses, training = _last_validation(run)
    state = _latest_state(run)
    vocab_size = state.get("settings", {}).get("vocab_size") or config.tokenizer.vocab_size
    if not vocab_size:
        raise ConfigError(
            f"{run}: the size of the vocabulary is not recorded, as the run has no checkpoint; "
            "resume the run until it saves one"
        )
    samples = training["consumed_samples"]
    tokens = samples * config.data.seq_length
    mixture = {name: values["tokens"] / tokens for name, values in training["domains"].items()}
    tokenizer = (state.get("data") or {}).get("tokenizer") or {}
    return [
        RunRecord(
            name=run.resolve().name,
            params=scaling_law_parameters(config, vocab_size),
            tokens=tokens,
            loss=values["loss"],
            bits_per_byte=values.get("bits_per_byte"),
            kind=_kind(run, config),
            language=language,
            share=mixture.get(language),
            seed=config.training.seed,
            flops=flops_per_token(config, vocab_size) * tokens,
            annealed=is_annealed(config, samples),
            tokenizer=tokenizer.get("hash", "")[:12],
            mixture=mixture,
        )
        for language, values in losses.items()
    ]


def is_annealed(config: ModelConfig, consumed: int) -> bool:
    """Return whether the learning rate has finished decaying after `consumed` samples.

    A constant rate does not decay, and one that decays with the inverse square root never ends.
    Less than a global batch may remain: it is not trained on.
    """
    o = config.optimizer
    decays = o.lr_decay_style not in ("constant", "inverse-square-root")
    falls = o.lr is not None and o.min_lr < o.lr
    left = Schedule.of(config).decay - consumed
    return decays and falls and left < config.training.global_batch_size


def _settings(run: Path) -> ModelConfig:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{run} is not a run directory: it has no config.yaml; give the folder that was "
            f"--save of a training"
        )
    config = Config().replace(**load_values(path))
    p = config.parallel
    return resolve_model(config, p.tensor_model_parallel_size * p.pipeline_model_parallel_size)


def _last_validation(run: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the held-out losses by name, and the record of the iteration before them."""
    path = run / "metrics.jsonl"
    try:
        records, _ = read_records(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give the folder that was --save of a "
            f"training"
        ) from None
    trained = {r["iteration"]: r for r in records if "domains" in r}
    for record in reversed(records):
        if record.get("validation") and record["iteration"] in trained:
            return record["validation"], trained[record["iteration"]]
    raise DataError(
        f"{run} has no held-out losses after its first iteration; train it with --eval-interval "
        f"and held-out text"
    )


def _latest_state(run: Path) -> dict[str, Any]:
    """Return the plain data of the newest checkpoint; empty where there is none."""
    for path in sorted(run.glob("iter_*/state.json"), reverse=True):
        found = load_json(read_text(path))
        return found if isinstance(found, dict) else {}
    return {}


def _kind(run: Path, config: Config) -> str:
    """Return whether the run, or the trunk of its branch, began with another run's weights."""
    try:
        lineage = load_json(read_text(run / "lineage.json"))
    except ChatflowError:  # of an earlier version
        lineage = {}
    continued = config.checkpoint.finetune or "weights" in lineage
    return "continued" if continued else "scratch"
