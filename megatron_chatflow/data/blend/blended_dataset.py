"""The blend: a plan maps samples to domains and ordinals, the domains' datasets read them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_chatflow.data.blend.batch import Batch, empty_batch, first_outside
from megatron_chatflow.data.blend.index_shuffle import shuffled_windows
from megatron_chatflow.data.blend.instruct_dataset import InstructDataset
from megatron_chatflow.data.blend.text_dataset import TextDataset
from megatron_chatflow.data.blend.window_dataset import WindowDataset, WindowOptions
from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.data.corpus.manifest import read_manifest
from megatron_chatflow.data.corpus.split import document_range
from megatron_chatflow.data.corpus.verify import manifest_error
from megatron_chatflow.errors import ChatflowError, DataError

if TYPE_CHECKING:
    from megatron_chatflow.curriculum import BlendPlan, Curriculum

_BLOCK = 256
_FIRST = np.zeros(1, np.int64)


class BlendedDataset:
    """A map-style dataset over all samples of a plan.

    Reading is thread-safe; nothing is stored but the open domains.

    Args:
        plan: sample number -> (domain, ordinal).
        domains: a dataset for each name of the plan.

    Raises:
        DataError: plan and domains have different names, another sequence length, or the plan draws
            from a domain that is empty.

    Attributes:
        plan: as given.
        domains: name -> dataset, in the plan's order.
    """

    def __init__(self, plan: "BlendPlan", domains: Mapping[str, WindowDataset]) -> None:
        _check_names(plan, domains)
        self.plan = plan
        self.domains = {name: domains[name] for name in plan.domain_names}
        self._members = tuple(self.domains.values())
        self._sizes = np.array([domain.num_samples for domain in self._members], np.int64)
        self._seed = self._members[0].seed
        self._block: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.plan.num_samples

    def __repr__(self) -> str:
        return (
            f"BlendedDataset({len(self)} samples of {self.plan.seq_length}: "
            + "; ".join(map(repr, self._members))
            + ")"
        )

    @property
    def epoch_samples(self) -> dict[str, int]:
        """Windows per epoch of each domain."""
        return {name: domain.num_samples for name, domain in self.domains.items()}

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each domain's corpus (`IndexedDataset.fingerprint`).

        By them a run determines that its data have not changed.
        """
        return {name: domain.dataset.fingerprint() for name, domain in self.domains.items()}

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        """Return sample n: what `read` returns, without the first axis."""
        if not 0 <= n < len(self):
            raise IndexError(f"sample {n} of {len(self)}")
        block = self._block
        if block is None or not block[0] <= n < block[0] + _BLOCK:
            begin = n - n % _BLOCK
            block = self._block = (begin, *self._locate(begin, min(begin + _BLOCK, len(self))))
        domain, ordinal, window = (part[n - block[0]] for part in block[1:])
        batch = empty_batch(1, self.plan.seq_length)
        self._members[domain].fill_chunk(batch, _FIRST, window[None])
        return {key: value[0] for key, value in batch.items()} | {
            "domain": domain,
            "ordinal": ordinal,
        }

    def read(self, start: int, stop: int, rows: np.ndarray | None = None) -> Batch:
        """Read samples start .. stop - 1, or those of them that `rows` names.

        Args:
            start: first sample.
            stop: the sample after the last one.
            rows: int [n], counted from start; None: all.

        Returns:
            tokens, labels, position_ids: int64 [n, S]; loss_mask: float32 [n, S]; segment_ids:
            int32 [n, S], from 0 in each sample, which document or conversation a position belongs
            to where attention is to be confined; domain: int64 [n], number in `plan.domain_names`;
            ordinal: int64 [n].

        Raises:
            IndexError: the range is not within the plan.
        """
        located = self._locate(start, stop)
        return self._read(*(located if rows is None else (part[rows] for part in located)))

    def provenance(self, n: int) -> dict:
        """Return where sample n comes from.

        Returns:
            `domain` (name), `ordinal`, `epoch`, `path` of the corpus, and `documents`: (document,
            first token, stop token), counted within the document, for all tokens that the sample
            reads as input or label.
        """
        domains, ordinals, windows = (int(part[0]) for part in self._locate(n, n + 1))
        domain = self._members[domains]
        where = {
            "domain": domain.name,
            "ordinal": ordinals,
            "epoch": domain.epoch_of(ordinals),
            "path": domain.dataset.prefix,
        }
        return where | {"documents": domain.window_documents(windows)}

    def _locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return domain, ordinal and window of each sample of a range: int64 [n] each."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"samples {start} to {stop} of {len(self)}")
        domains, ordinals = self.plan.locate(start, stop)
        return (
            domains,
            ordinals,
            shuffled_windows(ordinals, domains, self._sizes, self.plan.domain_names, self._seed),
        )

    def _read(self, domains: np.ndarray, ordinals: np.ndarray, windows: np.ndarray) -> Batch:
        batch = empty_batch(len(domains), self.plan.seq_length)
        order = np.argsort(domains, kind="stable")
        present, counts = np.unique(domains, return_counts=True)
        for k, stop, count in zip(present.tolist(), np.cumsum(counts), counts, strict=True):
            rows = order[stop - count : stop]
            self._members[k].fill(batch, rows, windows[rows])
        row = first_outside(batch, self._members[0].vocab_size)
        if row is not None:
            raise self._members[domains[row]].outside(
                batch, row, windows[row], f"sample {ordinals[row]} of the domain"
            )
        batch["domain"] = domains
        batch["ordinal"] = ordinals
        return batch


def open_domains(curriculum: "Curriculum", **options: Any) -> dict[str, WindowDataset]:
    """Open the corpora of a curriculum.

    Text takes constant time per corpus; instructions are packed.

    Args:
        curriculum: names, paths and kinds.
        **options: fields of `WindowOptions`; `seq_length` and `seed` are required.

    Returns:
        name -> dataset, in the file's order.

    Raises:
        DataError: a corpus is missing, damaged, or not of the kind that the curriculum says: one
            message with domain, path and what to do.
    """
    window_options = WindowOptions(**options)
    return {name: _open_domain(curriculum, name, window_options) for name in curriculum.domains}


def open_blend(
    curriculum: "Curriculum", plan: "BlendPlan", *, seq_length: int, seed: int, **options: Any
) -> BlendedDataset:
    """Open the blend of a plan; nothing is built first, whatever the length of the run.

    Args:
        curriculum: names, paths and kinds of the domains.
        plan: made from this curriculum (or amended to it).
        seq_length: positions in a sample; the plan's.
        seed: decides the order of the windows, together with the domain's name and the epoch.
        **options: further fields of `WindowOptions`.

    Raises:
        DataError: plan and curriculum name different domains, another `seq_length`, a domain that
            the plan draws from has nothing in this subset, or as `open_domains`.
    """
    if plan.seq_length != seq_length:
        raise DataError(
            f"seq_length {seq_length}: the plan was made for {plan.seq_length}; use that, "
            f"or make a new plan"
        )
    return BlendedDataset(
        plan, open_domains(curriculum, seq_length=seq_length, seed=seed, **options)
    )


def _open_domain(curriculum: "Curriculum", name: str, options: WindowOptions) -> WindowDataset:
    entry = curriculum.domains[name]
    try:
        dataset = IndexedDataset(
            entry.valid if entry.valid and options.subset == "valid" else entry.path
        )
        _check_kind(dataset, entry.kind)
        _check_manifest(dataset)
        split = options.split
        if entry.valid:
            split = "0,1" if options.subset == "valid" else "1"
        documents = document_range(split, options.subset, dataset.num_documents)
        if entry.kind != "instruct":
            return TextDataset(name, dataset, documents, options)
        opened = InstructDataset(
            name, dataset, documents, options, train_on_prompt=entry.train_on_prompt
        )
        drawn = any(stage.weights.get(name) for stage in curriculum.stages)
        if options.subset == "train" and drawn:
            _check_trained(opened)
        return opened
    except ChatflowError as error:
        raise DataError(f"domain {name}: {error}") from error


def _check_names(plan: "BlendPlan", domains: Mapping[str, WindowDataset]) -> None:
    for name in sorted(set(plan.domain_names) ^ set(domains)):
        there, missing = (
            ("plan", "curriculum") if name in plan.domain_names else ("curriculum", "plan")
        )
        raise DataError(
            f"domain {name}: it is in the {there} but not in the {missing}: keep a domain "
            f"that is no longer wanted in the file with "
            "weight 0, and amend the plan when one is added"
        )
    for name, drawn in zip(
        plan.domain_names, np.asarray(plan.counts(plan.num_samples)).tolist(), strict=True
    ):
        domain = domains[name]
        if domain.seq_length != plan.seq_length:
            raise DataError(
                f"seq_length {domain.seq_length}: the plan was made for {plan.seq_length}; "
                f"use that, or make a new plan"
            )
        if drawn and not domain.num_samples:
            raise DataError(
                f"domain {name}: its part of the split, documents {domain.documents[0]} to "
                f"{domain.documents[1]} of {domain.dataset.prefix}, "
                f"has nothing to read, and the plan draws {drawn} samples: give the part "
                f"more documents, or the domain weight 0"
            )


def _check_kind(dataset: IndexedDataset, kind: str) -> None:
    modes = dataset.header.multimodal
    if kind == "instruct" and not modes:
        raise DataError(
            f"corpus {dataset.prefix}: kind is instruct, but it has no sequence modes: "
            f"preprocess conversations, or write kind: text"
        )
    if kind == "text" and modes:
        raise DataError(
            f"corpus {dataset.prefix}: kind is text, but it has sequence modes "
            f"(conversations): write kind: instruct"
        )


def _check_trained(domain: InstructDataset) -> None:
    if domain.truncation.conversations and not domain.num_samples:
        raise DataError(
            f"corpus {domain.dataset.prefix}: none of its {domain.truncation.conversations:,} "
            f"conversations has a token to train on among its first "
            f"{domain.seq_length + 1} (seq_length + 1): raise seq_length, or give the "
            f"domain weight 0"
        )


def _check_manifest(dataset: IndexedDataset) -> None:
    manifest = read_manifest(dataset.prefix)
    problem = manifest and manifest_error(dataset.header, manifest, dataset.prefix)
    if problem:
        raise DataError(f"corpus {dataset.prefix}: {problem}")
