"""The section ``data``: what is read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.config.schema.section import Section, path_field


@dataclass(frozen=True)
class DataSettings(Section):
    """What is read."""

    _positive = ("seq_length",)

    seq_length: int = 0
    """Tokens in one sample."""
    curriculum: str | None = path_field()
    """The curriculum file: domains and their shares over the run."""
    data_path: list[str] | None = None
    """WEIGHT PREFIX [WEIGHT PREFIX ...] or one PREFIX: a constant curriculum over these corpora,
    instead of --curriculum.
    """
    split: str = "969,30,1"
    """Train, validation and test shares of each domain's documents, cut in file order."""
    reset_position_ids: bool = False
    """Restart positions at every document (inside instruction windows always)."""
    reset_attention_mask: bool = False
    """Do not attend across the documents of one window (inside instruction windows never)."""
    eod_mask_loss: bool = False
    """No loss at positions whose input is the end-of-document token."""
    amend_curriculum: bool = False
    """On resume with an edited curriculum: keep the past unchanged and follow the file from here
    on.
    """
