"""Held-out loss of a checkpoint: on the corpora of its curriculum, or on raw documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_chatflow.config import Config
from megatron_chatflow.distributed.launch import Launch, read_launch
from megatron_chatflow.errors import ChatflowError, ConfigError, ConfigErrors, messages_of
from megatron_chatflow.evaluation.eval_data import (
    EvalData,
    open_corpora,
    open_raw_texts,
    open_same_corpora,
    read_named_texts,
)
from megatron_chatflow.evaluation.eval_model import (
    EvalModel,
    ModelSource,
    find_source,
    laid_out_as,
    split_reference,
)
from megatron_chatflow.report.evaluation_table import changes

Values = Mapping[str, float | None]
"""`loss` (mean per token, in nats), `ppl`, `bits_per_byte` (None where the bytes of the text are
not known) and `tokens`.
"""


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss of one model."""

    checkpoint: str
    """Which weights."""
    iteration: int
    """Of the weights; 0 for a Hugging Face folder."""
    validation: Mapping[str, Values]
    """By domain, named validation set or text."""
    total: Values
    """Over all domains, or all texts; named validation sets do not count."""
    notes: tuple[str, ...] = ()
    """What to know about how the text was read."""
    reference: Evaluation | None = None
    """The second model, where one was given."""
    change: Mapping[str, Values] = field(default_factory=dict)
    """By name, percent by which `loss` and `bits_per_byte` are above the reference's; `loss` is
    None where the two tokenizers differ.
    """


def evaluate(
    load: str | Path,
    *,
    texts: Mapping[str, str | Path] | None = None,
    document_start: Literal["bos", "eod"] | None = None,
    reference: str | Path | None = None,
    ckpt_step: int | None = None,
    average_checkpoints: int = 1,
    use_ema: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Return the loss, perplexity and bits per byte of a checkpoint on held-out text.

    The text is each domain's validation part and each named validation set of the curriculum, or
    raw documents. Under torchrun or srun every rank calls this, and every rank gets the result.

    Args:
        load: A run directory or a Hugging Face folder.
        texts: {name: file} of raw documents to read in place of the corpora: JSON lines or parquet
            with `text`, or .txt with a document per line; .gz and .zst are decompressed.
        document_start: The token that documents of `texts` begin after. By default the
            end-of-document token; for a model that was only converted, the begin token where the
            tokenizer has one.
        reference: A second run, one of its checkpoints (``RUN/iter_0000100``) or a Hugging Face
            folder, to evaluate on the same text.
        ckpt_step: The iteration of a run directory; the latest by default.
        average_checkpoints: Evaluate the mean of the weights of that many last checkpoints.
        use_ema: Evaluate the running mean of the weights (of a run with `ema_decay`).
        settings: {setting: value} over those of `load`, by the names of the configuration, e.g.
            ``{"micro_batch_size": 16, "eval_iters": 1000}``.

    Raises:
        ChatflowError: What was given cannot be evaluated; no model has been opened yet.
    """
    source = find_source(load)
    steps = {} if ckpt_step is None else {"ckpt_step": ckpt_step}
    config = source.config({**(settings or {}), **steps})
    return evaluate_source(
        source,
        config,
        texts=texts or {},
        document_start=document_start,
        reference=reference,
        average_checkpoints=average_checkpoints,
        use_ema=use_ema,
    )


def evaluate_source(
    source: ModelSource,
    config: Config,
    *,
    texts: Mapping[str, str | Path],
    document_start: Literal["bos", "eod"] | None,
    reference: str | Path | None,
    average_checkpoints: int,
    use_ema: bool,
) -> Evaluation:
    """Evaluate a model that was found, with these settings; see `evaluate`."""
    if document_start and not texts:
        raise ConfigError(
            "document_start has no effect without raw text; drop it, or give texts by name"
        )
    launch = read_launch()
    model = source.resolve(config, launch.world_size, average_checkpoints, use_ema)
    documents = read_named_texts(texts)

    def open_data(model: EvalModel) -> EvalData:
        return open_raw_texts(model, documents, document_start)

    pairs = [(model, open_data(model) if documents else open_corpora(model.config))]
    if reference is not None:
        try:
            other = _find_reference(reference, model.config, launch)
            same = open_data if documents else lambda m: open_same_corpora(pairs[0][1], m.config)
            pairs.append((other, same(other)))
        except ChatflowError as error:
            lines = [f"reference {reference}: {message}" for message in messages_of(error)]
            raise ConfigErrors(lines) from None
    windows = config.validation.eval_iters * model.config.training.global_batch_size
    results = _measure(pairs, launch, None if documents else windows)
    if len(results) == 1:
        return results[0]
    result, before = results
    tokenizers = {data.tokenizer and data.tokenizer.fingerprint() for _, data in pairs}
    change = changes(result.validation, before.validation, same_tokens=len(tokenizers) == 1)
    return replace(result, reference=before, change=change)


def _find_reference(path: str | Path, config: Config, launch: Launch) -> EvalModel:
    """Return the model at `path`, laid out over the same processes and windows as `config`."""
    folder, step = split_reference(path)
    source = find_source(folder)
    settings = source.config({"ckpt_step": step})
    return source.resolve(laid_out_as(settings, config), launch.world_size)


def _measure(
    pairs: list[tuple[EvalModel, EvalData]],
    launch: Launch,
    max_windows: int | None,
) -> list[Evaluation]:
    from megatron_chatflow.distributed.process_groups import install_engine

    install_engine()
    from megatron_chatflow.evaluation.model_session import (
        measure,
        open_model,
        open_process_groups,
    )
    from megatron_chatflow.training.metrics import by_domain, loss_values

    results = []
    with open_process_groups(pairs[0][0].config, launch) as device:
        for model, data in pairs:
            session = open_model(model, data.vocab_size, device)
            # [sources, 3]: summed loss, tokens and bytes.
            sums = measure(session, data.sources, data.token_bytes, max_windows)
            del session
            values = by_domain(tuple(data.sources), sums)
            results.append(
                Evaluation(
                    model.name,
                    model.iteration,
                    {name: row for name, row in values.items() if row["tokens"]},
                    loss_values(sums[: data.num_domains].sum(0)),
                    data.notes,
                )
            )
    return results
