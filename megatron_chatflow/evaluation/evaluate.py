"""A model on held-out text: corpora of a curriculum, or raw documents."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_chatflow.data.blend.document_dataset import DocumentDataset
from megatron_chatflow.evaluation.model_session import Session
from megatron_chatflow.tokenizer import TokenBytes
from megatron_chatflow.training.validation import evaluate_domains

_SECONDS_BETWEEN = 10.0

logger = logging.getLogger(__name__)


def measure(
    session: Session,
    sources: Mapping[str, Any],
    token_bytes: TokenBytes,
    most: int | None,
) -> np.ndarray:
    """Float64 [sources, 3] of summed loss, tokens and bytes of each source, the same on every rank.

    Args:
        session: the model.
        sources: by name, what has `num_samples` and `read_window` (a text or instruction domain, or
        `DocumentDataset`). token_bytes: of the model's tokens. Of `DocumentDataset` the bytes of the text
        itself are taken. most: windows of each source at most; None: all.
    """
    names = tuple(sources)
    step, micro = session.forward_step(names, token_bytes), session.config.training.micro_batch_size
    last_logged = time.monotonic()

    def progress(name: str, done: int, windows: int) -> None:
        nonlocal last_logged
        if time.monotonic() - last_logged > _SECONDS_BETWEEN:
            last_logged = time.monotonic()
            logger.info(f"{name}: {done:,} of {windows:,} windows")

    sums = evaluate_domains(
        step, session.model, sources, names, most, micro, session.shape, session.device, progress
    )
    for row, source in zip(sums, sources.values(), strict=True):
        if isinstance(source, DocumentDataset):
            row[2] = source.bytes
    return sums
