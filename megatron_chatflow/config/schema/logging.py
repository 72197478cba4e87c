"""The section ``logging``: what is reported, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_chatflow.config.schema.section import Section, path_field


@dataclass(frozen=True)
class LoggingSettings(Section):
    """What is reported, and how often."""

    _intervals = ("log_interval", "tensorboard_log_interval")

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of the messages that are printed; lines of iterations have level info."""
    log_interval: int = 100
    """Iterations between lines on the console."""
    log_throughput: bool = False
    """Report TFLOP/s of each process (model FLOPs, without recomputation)."""
    tensorboard_dir: str | None = path_field()
    """Folder of the TensorBoard log; SAVE/tensorboard by default."""
    tensorboard_log_interval: int = 1
    """Iterations between points in TensorBoard."""
