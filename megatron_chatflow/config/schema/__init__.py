"""Every setting of a run: a frozen dataclass per section, with Megatron's argument names.

`Config` holds the settings as written. Its subclasses hold settings with the dependent defaults
filled in and checked (`config/validate.py` makes them): `DataConfig` to read the blend,
`ModelConfig` to run the model, `ResolvedConfig` to train. Their fields are not optional where the
value is known by then. Defaults are Megatron-LM's where Megatron-LM has the setting.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from megatron_chatflow.config.schema.checkpoint import CheckpointSettings
from megatron_chatflow.config.schema.data import DataSettings
from megatron_chatflow.config.schema.logging import LoggingSettings
from megatron_chatflow.config.schema.model import ModelSettings, ResolvedModelSettings
from megatron_chatflow.config.schema.optimizer import OptimizerSettings, ResolvedOptimizerSettings
from megatron_chatflow.config.schema.parallel import ParallelSettings
from megatron_chatflow.config.schema.precision import PrecisionSettings
from megatron_chatflow.config.schema.section import Section, type_hints
from megatron_chatflow.config.schema.tokenizer import TokenizerSettings, TokenizerType
from megatron_chatflow.config.schema.training import ResolvedTrainingSettings, TrainingSettings
from megatron_chatflow.config.schema.validation import ValidationSettings

__all__ = [
    "CheckpointSettings",
    "Config",
    "DataConfig",
    "DataSettings",
    "LoggingSettings",
    "ModelConfig",
    "ModelSettings",
    "OptimizerSettings",
    "ParallelSettings",
    "PrecisionSettings",
    "ResolvedConfig",
    "ResolvedModelSettings",
    "ResolvedOptimizerSettings",
    "ResolvedTrainingSettings",
    "Section",
    "TokenizerSettings",
    "TokenizerType",
    "TrainingSettings",
    "ValidationSettings",
    "section_of",
    "sections",
]


@dataclass(frozen=True)
class Config:
    """A complete run as written. The fields are the sections of the YAML file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a configuration file; settings that it does not name have their defaults.

        Raises:
            ConfigError: The file cannot be read, or has unknown settings or wrong types.
        """
        from megatron_chatflow.config.loader import load_values

        return cls().replace(**load_values(Path(path)))

    def replace(self, **settings: Any) -> Self:
        """Return a copy with some settings changed, in whichever sections they are.

        Example: ``config.replace(num_layers=4, lr=1e-3)``.
        """
        changes: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            changes.setdefault(section_of()[name], {})[name] = value
        return dataclasses.replace(
            self,
            **{
                section: dataclasses.replace(getattr(self, section), **values)
                for section, values in changes.items()
            },
        )


@dataclass(frozen=True)
class DataConfig(Config):
    """Settings with the batches and the sample length known: enough to read the blend."""

    training: ResolvedTrainingSettings = field(default_factory=ResolvedTrainingSettings)


@dataclass(frozen=True)
class ModelConfig(DataConfig):
    """Settings with the model and its layout known as well: enough to run the model."""

    model: ResolvedModelSettings = field(default_factory=ResolvedModelSettings)


@dataclass(frozen=True)
class ResolvedConfig(ModelConfig):
    """Settings with every dependent default filled in: enough to train."""

    optimizer: ResolvedOptimizerSettings = field(default_factory=ResolvedOptimizerSettings)


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Iterate over (name, dataclass) of every section, in order."""
    yield from type_hints(Config).items()


@functools.cache
def section_of() -> dict[str, str]:
    """Return {field name: the section that holds it}; field names are unique over all sections."""
    owner: dict[str, str] = {}
    for name, cls in sections():
        for f in dataclasses.fields(cls):
            assert f.name not in owner, f"{f.name} is in two sections"
            owner[f.name] = name
    return owner
