"""Everything a run reads, opened and checked before a model or a process group exists. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.config import Config, UsageError, total_samples
from megatron_chatflow.curriculum import BlendPlan, Curriculum, capacities, constant_curriculum, load_curriculum
from megatron_chatflow.data import open_domains, read_manifest
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """The curriculum, the corpora it names and the tokenizer that made them."""

    curriculum: Curriculum
    tokenizer: Tokenizer | None
    vocab_size: int
    token_bytes: np.ndarray
    """int64 [vocab_size]: UTF-8 bytes each token stands for; zeros where no tokenizer is given."""
    domains: Mapping[str, Any]
    """The training part of every domain."""
    notes: tuple[str, ...]
    """Sentences that the user should see once."""

    @property
    def epoch_samples(self) -> dict[str, int]:
        """Samples in one epoch of each domain's training part."""
        return {name: domain.num_samples for name, domain in self.domains.items()}


def open_inputs(config: Config) -> Inputs:
    """Open the curriculum, the tokenizer and every corpus. Raises ValueError (UsageError among them) where they do not fit together."""
    curriculum = _curriculum(config)
    tokenizer = _tokenizer(config)
    vocab_size = _vocab_size(config, tokenizer)
    domains = open_subset(config, curriculum, tokenizer, "train")
    for name, domain in curriculum.domains.items():
        _check_manifest(name, domain.path, tokenizer, vocab_size)
    notes = []
    token_bytes = np.zeros(vocab_size, np.int64)
    if tokenizer is None:
        notes.append("bits per byte are not reported: no tokenizer is given (--tokenizer-type, --tokenizer-model)")
    else:
        table = tokenizer.token_bytes()
        token_bytes[: len(table)] = table
    if config.data.reset_position_ids and config.model.position_embedding_type == "rope":
        notes.append("reset_position_ids has no effect with rope: rotary positions are relative, --reset-attention-mask alone keeps documents apart")
    return Inputs(curriculum, tokenizer, vocab_size, token_bytes, domains, tuple(notes))


def open_subset(config: Config, curriculum: Curriculum, tokenizer: Tokenizer | None, subset: str) -> Mapping[str, Any]:
    """The domains of one split (train, valid or test)."""
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


def make_plan(config: Config, curriculum: Curriculum, epoch_samples: Mapping[str, int]) -> BlendPlan:
    """The plan that the curriculum file tells for this run. `epoch_samples`: samples in one epoch of each domain."""
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
        raise UsageError("curriculum and data_path are both given; drop --data-path, the curriculum names the corpora")
    if data.curriculum:
        curriculum = load_curriculum(data.curriculum)
        if curriculum.clock == "iterations" and config.training.rampup_batch_size:
            raise UsageError(
                f"{data.curriculum}: clock iterations has no fixed length under rampup_batch_size; write the knots with `clock: samples`"
            )
        return curriculum
    if not data.data_path:
        raise UsageError("nothing to read; give --curriculum FILE, or --data-path WEIGHT PREFIX ...")
    words = data.data_path
    if len(words) == 1:
        return constant_curriculum([(1.0, words[0])])
    if len(words) % 2:
        raise UsageError(f"data_path has {len(words)} words; write pairs: --data-path WEIGHT PREFIX WEIGHT PREFIX ...")
    pairs = []
    for weight, prefix in zip(words[::2], words[1::2], strict=True):
        try:
            pairs.append((float(weight), prefix))
        except ValueError:
            raise UsageError(f"data_path: {weight!r} is not a weight; write pairs: --data-path WEIGHT PREFIX WEIGHT PREFIX ...") from None
    return constant_curriculum(pairs)


def _tokenizer(config: Config) -> Tokenizer | None:
    t = config.tokenizer
    if t.tokenizer_type is None:
        if t.tokenizer_model or t.vocab_file:
            raise UsageError("tokenizer_model is given but tokenizer_type is not; add --tokenizer-type, e.g. SentencePieceTokenizer")
        return None
    return load_tokenizer(
        t.tokenizer_type, tokenizer_model=t.tokenizer_model, vocab_file=t.vocab_file, merge_file=t.merge_file, vocab_size=t.vocab_size
    )


def _vocab_size(config: Config, tokenizer: Tokenizer | None) -> int:
    given = config.tokenizer.vocab_size
    if tokenizer is None:
        if not given:
            raise UsageError("the size of the vocabulary is not known; give --tokenizer-type and --tokenizer-model, or --vocab-size")
        return given
    if given and given < tokenizer.vocab_size:
        raise UsageError(
            f"vocab_size {given} is smaller than the {tokenizer.vocab_size} tokens of {tokenizer.name}; raise --vocab-size or leave it out"
        )
    return given or tokenizer.vocab_size


def _eod(config: Config, tokenizer: Tokenizer | None) -> int | None:
    if config.data.eod_mask_loss and tokenizer is None:
        raise UsageError("eod_mask_loss needs the end-of-document token; give --tokenizer-type and --tokenizer-model")
    return tokenizer.eod if tokenizer else None


def _check_manifest(name: str, prefix: str, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    manifest = read_manifest(prefix)
    if manifest is None:
        return
    made_with = manifest.tokenizer
    if tokenizer is not None and made_with.get("hash") and made_with["hash"] != tokenizer.fingerprint():
        raise UsageError(
            f"domain {name}: {Path(prefix).name} was made with the tokenizer {made_with.get('name')} ({made_with.get('type')}), "
            f"not with {tokenizer.name} of this run; "
            "give that tokenizer, or preprocess the corpus again"
        )
    if made_with.get("vocab_size") and made_with["vocab_size"] > vocab_size:
        raise UsageError(f"domain {name}: its tokenizer has {made_with['vocab_size']} tokens, more than vocab_size {vocab_size}; raise --vocab-size")
