"""What a run really read: every rank's loader writes down each sample that it hands to a training
step, and the notes of all launches are audited.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from megatron_chatflow.curriculum import load_curriculum
from megatron_chatflow.data import open_domains
from tests.curriculum.cases import share_at
from tests.pool import Pool
from tests.sample import DOMAINS, QUICKSTART, SETTINGS, metrics, train

MODEL = SETTINGS["model"] | {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64}
TRAINING = {"micro_batch_size": 2, "global_batch_size": 16, "train_samples": 320}
TINY = SETTINGS | {
    "model": MODEL,
    "training": TRAINING,
    "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
}
THREE: dict[str, dict[str, Any]] = {"en": {}, "zh": {}, "en-zh": {}}
STAGES = [
    {"name": "english", "at": 0, "weights": {"en": 0.7, "en-zh": 0.3}},
    {
        "name": "bilingual",
        "at": 80,
        "weights": {"en": 0.3, "zh": 0.5, "en-zh": 0.2},
        "ramp": "root2",
    },
    {
        "name": "chinese",
        "at": 240,
        "weights": {"en": 0.1, "zh": 0.8, "en-zh": 0.1},
        "ramp": "cosine",
    },
]
BOUND = 4
"""Samples that a domain may be away from its schedule at any time."""


def make_corpus(name: str, folder: Path, lines: Sequence[str]) -> None:
    """The corpus of domain `name` in `folder`, from these lines of JSON."""
    from megatron_chatflow.cli.preprocess import main

    source, (prefix, extra) = folder / f"{name}.jsonl", DOMAINS[name]
    source.write_text("".join(lines), encoding="utf-8")
    words = [
        "--input",
        source,
        "--output-prefix",
        folder / prefix.split("_")[0],
        "--workers",
        1,
        *([] if name == "instruct" else ["--append-eod"]),
    ]
    words += [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        TINY["tokenizer"]["tokenizer_model"],
    ]
    assert main([str(word) for word in [*words, *extra]]) == 0


def source_lines(name: str) -> list[str]:
    """The lines of a sample corpus."""
    return (
        (QUICKSTART / "data" / f"{name}.jsonl")
        .read_text(encoding="utf-8")
        .splitlines(keepends=True)
    )


def recording_loader(notes: Path) -> type:
    """The loop's loader, of a kind that writes down each sample that it hands out, in a file of
    this rank in `notes`.
    """
    from megatron_chatflow.data.blend.dataloader import rank_rows
    from megatron_chatflow.training import train_loop

    notes.mkdir(parents=True, exist_ok=True)
    path = notes / f"rank{os.environ.get('RANK', '0')}.jsonl"

    class Recording(train_loop.BlendDataLoader):
        def iteration(self, start: int, global_batch_size: int) -> list[Any]:
            batches = super().iteration(start, global_batch_size)
            rows = rank_rows(
                global_batch_size,
                self.micro_batch_size,
                self.data_parallel_rank,
                self.data_parallel_size,
            )
            with path.open("a") as file:
                for numbers, batch in zip(rows + start, batches, strict=True):
                    for i, n in enumerate(numbers.tolist()):
                        name = self.blend.plan.domain_names[batch["domain"][i]]
                        file.write(
                            json.dumps([n, name, int(batch["ordinal"][i]), fingerprint(batch, i)])
                            + "\n"
                        )
            return batches

    return Recording


def audited_train(folder: Path, notes: Path, *words: str) -> tuple[int, str, str]:
    """`train` on this rank; what its loader hands out goes to a file of this rank in `notes`, a
    folder for each launch.
    """
    from megatron_chatflow.training import train_loop

    with mock.patch.object(train_loop, "BlendDataLoader", recording_loader(notes)):
        return train(folder, *words)


def fingerprint(batch: dict[str, np.ndarray], row: int) -> str:
    """A hash of what a sample trains on."""
    content = b"".join(
        np.ascontiguousarray(batch[key][row]).tobytes() for key in ("tokens", "labels", "loss_mask")
    )
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Served:
    """The samples behind a run's weights, in order: sample n is entry n."""

    names: list[str]
    ordinals: list[int]
    fingerprints: list[str]

    def repeated(self) -> dict[str, int]:
        """For each domain, how many of its samples were read before."""
        return {name: len(found) - len(set(found)) for name, found in self.by_domain().items()}

    def skipped(self) -> dict[str, int]:
        """For each domain, how many of its samples were passed over, though later ones were
        read.
        """
        return {name: max(found) + 1 - len(set(found)) for name, found in self.by_domain().items()}

    def by_domain(self) -> dict[str, list[int]]:
        """The ordinals of each domain."""
        found: dict[str, list[int]] = {}
        for name, ordinal in zip(self.names, self.ordinals, strict=True):
            found.setdefault(name, []).append(ordinal)
        return found

    def farthest(self, schedule: Sequence[tuple[int, list[dict[str, Any]]]]) -> float:
        """The farthest that a domain ever is from its schedule, in samples.

        Args:
            schedule: (first sample, stages with `at` in samples), each of them in force until the
            next.
        """
        every = sorted(
            {name for _, stages in schedule for stage in stages for name in stage["weights"]}
        )
        stops = [start for start, _ in schedule[1:]] + [len(self.names)]
        steps = []
        for (start, stages), stop in zip(schedule, stops, strict=True):
            times = (np.arange((stop - start) * 4) + 0.5) / 4 + start
            steps.append(share_at(stages, every, times).reshape(stop - start, 4, -1).mean(1))
        hits = np.array([[name == other for other in every] for name in self.names], float)
        return float(np.abs((hits - np.concatenate(steps)).cumsum(0)).max())


def read_notes(launches: Sequence[Path]) -> Served:
    """The notes of all launches of a run, in order. A launch continues from a checkpoint: what was
    read after that one is not in the weights.
    """
    samples: dict[int, tuple[str, int, str]] = {}
    for launch in launches:
        lines = [
            json.loads(line)
            for path in sorted(launch.glob("rank*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        here: dict[int, tuple[str, int, str]] = {}
        for n, *what in lines:
            assert here.setdefault(n, tuple(what)) == tuple(what), (
                f"ranks read sample {n} differently"
            )
        samples = {n: what for n, what in samples.items() if n < min(here)} | here
    assert sorted(samples) == list(range(len(samples))), (
        "the samples of the run are not 0, 1, 2, ..."
    )
    names, ordinals, fingerprints = zip(*(samples[n] for n in sorted(samples)), strict=True)
    return Served(list(names), list(ordinals), list(fingerprints))


class Story:
    """A run and its launches."""

    def __init__(self, pool: Pool, corpora: Path, folder: Path) -> None:
        self.pool, self.corpora, self.folder, self.run = pool, corpora, folder, folder / "run"
        self.launches: list[Path] = []
        self.output = ""
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml.safe_dump(TINY))

    def copy(self, folder: Path) -> Story:
        """The same run in another folder, to continue differently."""
        shutil.copytree(self.folder, folder)
        other = copy.copy(self)
        other.folder, other.run = folder, folder / "run"
        other.launches = [folder / launch.name for launch in self.launches]
        return other

    def write(
        self,
        stages: list[dict[str, Any]],
        domains: Mapping[str, dict[str, Any]] = THREE,
        **top: Any,
    ) -> None:
        """The curriculum file. `domains`: further keys of each; paths and kinds are given by the
        names.
        """
        kinds = {name: {"kind": "instruct"} if name == "instruct" else {} for name in domains}
        domains = {
            name: {"path": str(self.corpora / DOMAINS[name][0])} | kinds[name] | keys
            for name, keys in domains.items()
        }
        (self.folder / "curriculum.yaml").write_text(
            yaml.safe_dump({"domains": domains, "stages": stages} | top)
        )

    def launch(self, *words: str, world: int = 1) -> list[tuple[int, str, str]]:
        """Start the run, or resume it; returns the answer of each rank."""
        notes = self.folder / f"launch{len(self.launches)}"
        done = self.pool.run(
            world,
            audited_train,
            self.folder,
            notes,
            "--save",
            str(self.run),
            "--load",
            str(self.run),
            *words,
        )
        if any(notes.iterdir()):
            self.launches.append(notes)
        return done

    def go(self, *words: str, world: int = 1) -> str:
        """`launch`, which must do well; what rank 0 printed."""
        done = self.launch(*words, world=world)
        assert [code for code, _, _ in done] == [0] * world, done
        self.output = done[0][1]
        return self.output

    def refused(self, *words: str) -> str:
        """`launch`, which must be refused without a trace; the sentence."""
        before = {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        ((code, out, err),) = self.launch(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        assert before == {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        return err

    def audit(self, samples: int, *schedule: tuple[int, list[dict[str, Any]]]) -> Served:
        """Audits all samples read: none is lost or repeated, they follow the schedule, hold what
        the corpora say, and are what the run has recorded.

        Args:
            samples: how many there must be.
            schedule: (first sample, stages with `at` in samples), each of them in force until the
            next.
        """
        served = read_notes(self.launches)
        assert len(served.names) == samples, len(served.names)
        lost = {"repeated": served.repeated(), "skipped": served.skipped()}
        assert {count for counts in lost.values() for count in counts.values()} == {0}, lost
        farthest = served.farthest(schedule)
        assert farthest <= BOUND, farthest
        domains = open_domains(
            load_curriculum(self.folder / "curriculum.yaml"),
            seq_length=64,
            seed=1234,
            split=TINY["data"]["split"],
        )
        for name, ordinals in served.by_domain().items():
            batch = domains[name].read(ordinals)
            mine = [
                f
                for f, other in zip(served.fingerprints, served.names, strict=True)
                if other == name
            ]
            assert mine == [fingerprint(batch, i) for i in range(len(ordinals))]
            for epoch in range(0, len(mine), domains[name].num_samples):
                texts = mine[epoch : epoch + domains[name].num_samples]
                assert len(set(texts)) == len(texts), (
                    f"a text of {name} was trained on twice in one epoch"
                )
        records = metrics(self.run)
        assert [r["iteration"] for r in records] == list(range(1, len(records) + 1))
        for record in records:
            start, stop = record["samples"]
            recorded = {
                name: values["samples"]
                for name, values in record["domains"].items()
                if values["samples"]
            }
            assert recorded == {
                name: served.names[start:stop].count(name) for name in set(served.names[start:stop])
            }
        assert records[-1]["consumed_samples"] == samples
        return served
