"""The corpora that the settings name, as far as opening them shows it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_chatflow.cli.diagnostics import Row
from megatron_chatflow.config import Config, resolve_model
from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.curriculum import load_curriculum
from megatron_chatflow.data import IndexedDataset, read_manifest
from megatron_chatflow.data.corpus.verify import manifest_error
from megatron_chatflow.errors import ChatflowError


def named_corpora(config: Config) -> dict[str, str]:
    """Return {name: prefix} of the corpora that the curriculum or --data-path names.

    Raises:
        ConfigError: the curriculum file cannot be used.
    """
    data = config.data
    if data.curriculum:
        curriculum = load_curriculum(data.curriculum)
        found = {name: domain.path for name, domain in curriculum.domains.items()}
        found |= {
            f"{name} (valid)": domain.valid
            for name, domain in curriculum.domains.items()
            if domain.valid
        }
        return found | {
            f"{name} (validation)": domain.path for name, domain in curriculum.validation.items()
        }
    words = data.data_path or []
    prefixes = words if len(words) == 1 else words[1::2]
    return {Path(prefix).name: prefix for prefix in prefixes}


def fingerprints(prefixes: dict[str, str]) -> dict[str, str]:
    """Return {name: fingerprint, or the error}, equal on machines that read the same corpora."""
    found = {}
    for name, prefix in prefixes.items():
        try:
            found[f"corpus {name}"] = IndexedDataset(prefix).fingerprint()
        except ChatflowError as error:
            found[f"corpus {name}"] = str(error)
    return found


def corpora(prefixes: dict[str, str]) -> list[Row]:
    """Return a row for each corpus, and one that compares their tokenizers."""
    rows = [_corpus(name, prefix) for name, prefix in prefixes.items()]
    if any(row.wrong for row in rows):
        return rows
    made_with: dict[str, list[str]] = {}
    for name, prefix in prefixes.items():
        manifest = read_manifest(prefix)
        if manifest is not None and manifest.tokenizer["hash"]:
            made_with.setdefault(
                f"{manifest.tokenizer['name']} {manifest.tokenizer['hash'][:8]}", []
            ).append(name)
    if len(made_with) > 1:
        listed = "; ".join(
            f"{tokenizer}: {', '.join(names)}" for tokenizer, names in made_with.items()
        )
        rows.append(
            Row(
                "tokenizer",
                f"{len(made_with)} different ones",
                f"{listed}; preprocess with one for all",
                wrong=True,
            )
        )
    elif made_with:
        rows.append(Row("tokenizer", next(iter(made_with)), "of every corpus that names one"))
    return rows


def _corpus(name: str, prefix: str) -> Row:
    title = f"corpus {name}"
    try:
        dataset, manifest = IndexedDataset(prefix), read_manifest(prefix)
    except ChatflowError as error:
        return Row(title, "cannot be read", str(error), wrong=True)
    header = dataset.header
    value = f"{header.num_documents:,} documents, {header.num_tokens:,} tokens"
    mismatch = manifest_error(header, manifest, prefix) if manifest else None
    if mismatch:
        return Row(title, value, mismatch, wrong=True)
    notes = [prefix] if manifest else [prefix, "no manifest: bytes and tokenizer are not known"]
    return Row(title, value, "; ".join(notes))


def checkpoint_size(config: Config, prefixes: dict[str, str]) -> int | None:
    """Return the bytes of one checkpoint; None where the model or its vocabulary is not known."""
    from megatron_chatflow.planner.memory import checkpoint_bytes
    from megatron_chatflow.planner.parameters import layout_of, stage_parameters

    vocab_size = config.tokenizer.vocab_size or _vocab_size(prefixes)
    try:
        alone = resolve_model(dataclasses.replace(config, parallel=ParallelSettings()), 1)
    except ChatflowError:
        return None
    if vocab_size is None:
        return None
    return checkpoint_bytes(alone, stage_parameters(alone, vocab_size, layout_of(alone, 1), 0))


def _vocab_size(prefixes: dict[str, str]) -> int | None:
    """Return the largest vocabulary that a manifest names."""
    sizes = []
    for prefix in prefixes.values():
        try:
            manifest = read_manifest(prefix)
        except ChatflowError:
            continue
        if manifest is not None and manifest.tokenizer["vocab_size"]:
            sizes.append(manifest.tokenizer["vocab_size"])
    return max(sizes, default=None)
