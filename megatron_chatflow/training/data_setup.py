"""Everything a run reads, opened and checked before a model or a process group exists.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.config import Config, DataConfig, total_samples
from megatron_chatflow.curriculum import (
    BlendPlan,
    Curriculum,
    capacities,
    constant_curriculum,
    load_curriculum,
)
from megatron_chatflow.data import InstructDataset, Manifest, open_domains, read_manifest
from megatron_chatflow.errors import ChatflowError, ConfigError, DataError, SampleError
from megatron_chatflow.tokenizer import TokenBytes, Tokenizer, load_tokenizer

MUCH_LOST = 0.01
"""Share of conversations, or of tokens to train on, whose loss at seq_length is a warning."""
_CHECKED_WINDOWS = 32
_CHECKED_TOKENS = 1 << 17
"""How much of each corpus `check_tokens` reads at most."""


@dataclass(frozen=True)
class Inputs:
    """The curriculum, the corpora it names and the tokenizer that made them."""

    curriculum: Curriculum
    tokenizer: Tokenizer | None
    vocab_size: int
    token_bytes: TokenBytes
    domains: Mapping[str, Any]
    """The training part of every domain."""
    held_out: Mapping[str, Any]
    """What is validated on: the domains' validation parts, then the named validation sets."""
    tokenizer_flags: str
    """The flags that give the tokenizer that made the corpora."""
    notes: tuple[str, ...]
    """Messages that the user should see once."""

    @property
    def epoch_samples(self) -> dict[str, int]:
        """Return the samples in one epoch of each domain's training part."""
        return {name: domain.num_samples for name, domain in self.domains.items()}


def open_inputs(config: Config, *, held_out: bool = False) -> Inputs:
    """Open the curriculum, the tokenizer and every corpus.

    Args:
        config: resolved settings.
        held_out: whether to open the corpora for validation, too.

    Raises:
        ChatflowError: they do not fit together.
    """
    curriculum = _curriculum(config)
    tokenizer = _tokenizer(config)
    domains = _open_subset(config, curriculum, tokenizer, "train")
    validated = _open_held_out(config, curriculum, tokenizer) if held_out else {}
    prefixes = {f"domain {name}": domain.dataset.prefix for name, domain in domains.items()}
    prefixes |= {f"validation {name}": domain.dataset.prefix for name, domain in validated.items()}
    manifests = {label: read_manifest(prefix) for label, prefix in prefixes.items()}
    flags = _tokenizer_flags(manifests)
    vocab_size = _vocab_size(config, tokenizer, manifests, flags)
    _check_manifests(prefixes, manifests, tokenizer, vocab_size)
    notes = _held_out_notes(config, curriculum, validated, held_out) + _cut_notes(domains)
    for domain in (*domains.values(), *validated.values()):
        domain.vocab_size = vocab_size
    if tokenizer is None:
        notes.append(f"bits per byte are not reported: no tokenizer is given ({flags})")
    if config.data.reset_position_ids and config.model.position_embedding_type == "rope":
        notes.append(
            "reset_position_ids has no effect with rope: rotary positions are relative, "
            "--reset-attention-mask alone keeps documents apart"
        )
    return Inputs(
        curriculum,
        tokenizer,
        vocab_size,
        TokenBytes.of(tokenizer, vocab_size),
        domains,
        validated,
        flags,
        tuple(notes),
    )


def check_tokens(inputs: Inputs) -> str:
    """Read some windows of every corpus and look for token ids outside of the vocabulary.

    The windows are evenly spaced.

    Returns:
        What was checked, as a note.

    Raises:
        DataError: such an id was found.
    """
    checked = total = 0
    for domain in (*inputs.domains.values(), *inputs.held_out.values()):
        most = max(1, min(_CHECKED_WINDOWS, _CHECKED_TOKENS // domain.seq_length))
        windows = (
            np.unique(np.linspace(0, domain.num_samples - 1, most).astype(np.int64))
            if domain.num_samples
            else np.empty(0, np.int64)
        )
        try:
            domain.read_window(windows)
        except SampleError as error:  # no run has begun to read it
            raise DataError(str(error)) from None
        checked, total = checked + len(windows), total + domain.num_samples
    return (
        f"token ids are below {inputs.vocab_size} in the {checked:,} windows of {total:,} "
        f"that were looked at; a run checks every batch, "
        f"chatflow corpus verify --vocab-size {inputs.vocab_size} checks a corpus from end to end"
    )


def open_tokenizer(config: Config) -> tuple[Tokenizer, int]:
    """Return the tokenizer and the size of the vocabulary, where no corpus is read.

    Raises:
        ConfigError: no tokenizer is given.
    """
    tokenizer = _tokenizer(config)
    if tokenizer is None:
        raise ConfigError("the tokenizer is not known; give --tokenizer-type and --tokenizer-model")
    return tokenizer, _vocab_size(config, tokenizer, {}, "")


def _open_held_out(
    config: Config, curriculum: Curriculum, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Open the domains' validation parts and the named validation sets.

    Raises ConfigError where all of them are empty.
    """
    validated = dict(_open_subset(config, curriculum, tokenizer, "valid"))
    for name, entry in curriculum.validation.items():
        alone = replace(curriculum, domains={name: replace(entry, valid=entry.path)})
        try:
            validated |= _open_subset(config, alone, tokenizer, "valid")
        except ChatflowError as error:
            raise ConfigError(f"validation {name}: {error.__cause__ or error}") from None
    if not any(domain.num_samples for domain in validated.values()):
        raise ConfigError(
            f"split {config.data.split} leaves no validation documents in any domain; give "
            f"--split a larger second part, or name validation "
            "corpora in the curriculum (domains.NAME.valid, or validation)"
        )
    return validated


def _held_out_notes(
    config: Config, curriculum: Curriculum, validated: Mapping[str, Any], held_out: bool
) -> list[str]:
    own = [f"domains.{name}.valid" for name, domain in curriculum.domains.items() if domain.valid]
    if (own or curriculum.validation) and not held_out:
        keys = ", ".join([*own, *(f"validation.{name}" for name in curriculum.validation)])
        return [f"not read without --eval-interval: {keys}"]
    empty = [name for name, domain in validated.items() if not domain.num_samples]
    notes = (
        [f"nothing held out, so no validation loss: {', '.join(empty)} (split {config.data.split})"]
        if empty
        else []
    )
    cut = [
        name
        for name in empty
        if isinstance(validated[name], InstructDataset) and validated[name].truncation.left_out
    ]
    if cut:
        limit = config.data.seq_length
        notes.append(
            f"no held-out conversation of {', '.join(cut)} has a token with loss at "
            f"seq_length {limit}; raise --seq-length"
        )
    return notes


def _cut_notes(domains: Mapping[str, Any]) -> list[str]:
    """Return a line for each instruction domain that loses something at seq_length.

    The line is a warning above 1%.
    """
    notes = []
    for name, domain in domains.items():
        if not isinstance(domain, InstructDataset) or not (
            domain.truncation.left_out or domain.truncation.cut
        ):
            continue
        losses = domain.truncation
        conversations, tokens = (
            losses.left_out / losses.conversations,
            losses.lost_tokens / max(losses.tokens, 1),
        )
        notes.append(
            "warning: "
            * (max(conversations, tokens) > MUCH_LOST)
            + f"domain {name}: at seq_length {domain.seq_length}, {losses.left_out:,} of "
            f"{losses.conversations:,} conversations "
            f"({conversations:.1%}) have no token to train on and are left out, "
            f"{losses.cut:,} are cut, and {tokens:.1%} of the tokens to train on "
            "are lost; raise --seq-length"
        )
    return notes


def _open_subset(
    config: Config, curriculum: Curriculum, tokenizer: Tokenizer | None, subset: str
) -> Mapping[str, Any]:
    """Open the domains of one split (train or valid)."""
    data = config.data
    return open_domains(
        curriculum,
        seq_length=data.seq_length,
        seed=config.training.seed,
        split=data.split,
        subset=subset,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        eod=_eod(config, tokenizer),
    )


def make_plan(
    config: DataConfig, curriculum: Curriculum, epoch_samples: Mapping[str, int]
) -> BlendPlan:
    """Return the plan of the curriculum file for this run.

    Args:
        config: resolved settings.
        curriculum: the file.
        epoch_samples: samples in one epoch of each domain.
    """
    return BlendPlan(
        curriculum,
        num_samples=total_samples(config),
        global_batch_size=config.training.global_batch_size,
        seq_length=config.data.seq_length,
        capacities=capacities(curriculum, epoch_samples),
    )


def _curriculum(config: Config) -> Curriculum:
    data = config.data
    if data.curriculum and data.data_path:
        raise ConfigError(
            "curriculum and data_path are both given; drop --data-path, the curriculum "
            "names the corpora"
        )
    if data.curriculum:
        curriculum = load_curriculum(data.curriculum)
        if curriculum.clock == "iterations" and config.training.rampup_batch_size:
            raise ConfigError(
                f"{data.curriculum}: clock iterations has no fixed length under "
                f"rampup_batch_size; write the knots with `clock: samples`"
            )
        return curriculum
    if not data.data_path:
        raise ConfigError(
            "nothing to read; give --curriculum FILE, or --data-path WEIGHT PREFIX ..."
        )
    words = data.data_path
    if len(words) == 1:
        return constant_curriculum([(1.0, words[0])])
    if len(words) % 2:
        raise ConfigError(
            f"data_path has {len(words)} words; write pairs: --data-path WEIGHT PREFIX "
            f"WEIGHT PREFIX ..."
        )
    pairs = []
    for weight, prefix in zip(words[::2], words[1::2], strict=True):
        try:
            pairs.append((float(weight), prefix))
        except ValueError:
            raise ConfigError(
                f"data_path: {weight!r} is not a weight; write pairs: --data-path WEIGHT "
                f"PREFIX WEIGHT PREFIX ..."
            ) from None
    return constant_curriculum(pairs)


def _tokenizer(config: Config) -> Tokenizer | None:
    t = config.tokenizer
    if t.tokenizer_type is None:
        if t.tokenizer_model or t.vocab_file:
            raise ConfigError(
                "tokenizer_model is given but tokenizer_type is not; add --tokenizer-type, "
                "e.g. SentencePieceTokenizer"
            )
        return None
    return load_tokenizer(
        t.tokenizer_type,
        tokenizer_model=t.tokenizer_model,
        vocab_file=t.vocab_file,
        merge_file=t.merge_file,
        vocab_size=t.vocab_size,
    )


def _vocab_size(
    config: Config,
    tokenizer: Tokenizer | None,
    manifests: Mapping[str, Manifest | None],
    flags: str,
) -> int:
    """Return the size that is given, or the tokenizer's, or the largest of the manifests."""
    given = config.tokenizer.vocab_size
    if tokenizer is None:
        recorded = [
            manifest.tokenizer.get("vocab_size") if manifest else None
            for manifest in manifests.values()
        ]
        if not given and not all(recorded):
            raise ConfigError(
                f"the size of the vocabulary is not known; give {flags}, or --vocab-size"
            )
        return given or max(size for size in recorded if size)
    if given and given < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size {given} is smaller than the {tokenizer.vocab_size} tokens of "
            f"{tokenizer.name}; raise --vocab-size or leave it out"
        )
    return given or tokenizer.vocab_size


def _tokenizer_flags(manifests: Mapping[str, Manifest | None]) -> str:
    """Return the flags that give the tokenizer of the first corpus that names one."""
    made_with = next((manifest.tokenizer for manifest in manifests.values() if manifest), {})
    kind, name = made_with.get("type"), made_with.get("name")
    if not kind:
        return "--tokenizer-type and --tokenizer-model"
    files = {
        "GPT2BPETokenizer": " with --vocab-file and --merge-file",
        "ByteLevelTokenizer": "",
        "NullTokenizer": "",
    }
    return f"--tokenizer-type {kind}{files.get(kind, f' --tokenizer-model .../{name}')}"


def _eod(config: Config, tokenizer: Tokenizer | None) -> int | None:
    if config.data.eod_mask_loss and tokenizer is None:
        raise ConfigError(
            "eod_mask_loss needs the end-of-document token; give --tokenizer-type and "
            "--tokenizer-model"
        )
    return tokenizer.eod if tokenizer else None


def _check_manifests(
    prefixes: Mapping[str, str],
    manifests: Mapping[str, Manifest | None],
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> None:
    """Raise ConfigError for a corpus that another tokenizer made.

    Compared with this run's tokenizer, or, where none is given, with that of earlier corpora.
    """
    wanted = (
        None
        if tokenizer is None
        else (tokenizer.fingerprint(), f"{tokenizer.name} of this run", "give that tokenizer")
    )
    for label, manifest in manifests.items():
        if manifest is None:
            continue
        made_with = manifest.tokenizer
        if made_with.get("hash"):
            wanted = wanted or (
                made_with["hash"],
                f"{made_with.get('name')} of {label}",
                "use one tokenizer for all",
            )
            if made_with["hash"] != wanted[0]:
                raise ConfigError(
                    f"{label}: {Path(prefixes[label]).name} was made with the tokenizer "
                    f"{made_with.get('name')} ({made_with.get('type')}), "
                    f"not with {wanted[1]}; {wanted[2]}, or preprocess the corpus again"
                )
        if made_with.get("vocab_size") and made_with["vocab_size"] > vocab_size:
            raise ConfigError(
                f"{label}: its tokenizer has {made_with['vocab_size']} tokens, more than "
                f"vocab_size {vocab_size}; raise --vocab-size"
            )
