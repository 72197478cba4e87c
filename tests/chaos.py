"""Chaos test: faults hit a run of TP2 x DP2 with asynchronous saves; its result must not change.

    python tests/chaos.py                          # 60 faults, about twenty minutes on two cores
    python tests/chaos.py --faults 200             # an hour
    python tests/chaos.py --faults 15 --seed 15    # five minutes

Faults at a random moment of training, validation or saving: kill -9 of a random rank, or of the
process that writes its shards; SIGTERM, SIGUSR1, SIGINT or SIGHUP to a random rank; a rank stopped
for three seconds, or until the others have exited; the disk full for a second; a second run that is
started in the same directory. Faults at a chosen instant: a rank is killed right before its n-th
file operation below the run directory (writing, fsync, rename, mkdir, remove). Faults between
launches: a file of the newest checkpoint is damaged; the run is sent back to an older checkpoint.

When the run has exited, it is started again. It must resume from the checkpoint that the pointer
names, or where that one is damaged from the one before, and the checkpoint must be intact. Every
process must be gone within 60 s, and no output may hold a traceback. At the end every loss and
every bit of the checkpoint must be those of an undisturbed run, and the audit must find every
sample read once. Filling the disk needs a separate small tmpfs, and root to mount it; without
that this failure is left out, which is reported.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos_faults import damage_newest, fill, kill_writer, small_disk
from tests.chaos_ranks import WORLD, Launch, preload, repair_notes
from tests.stress import make_parser, markdown, prepare_process

BATCH = 16
LAYOUT = ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--ema-decay", "0.9"]
ITERATIONS_PER_FAILURE = 12
DOWN = 60.0
"""Seconds within which all ranks must exit after one is killed."""

AT_RANDOM_MOMENTS = {
    "kill -9": 3, "kill -9 of a writer": 1, "SIGTERM": 1, "SIGUSR1": 1, "SIGINT": 1, "SIGHUP": 1,
    "stopped for 3 s": 1, "stopped": 1, "full disk": 1,
    "second run": 1,
}  # fmt: skip
"""{failure at a random moment of a launch: its weight}."""
AT_LAUNCH = {"kill -9 at a file operation": 4, "damaged checkpoint": 1, "sent back": 1}
"""{failure that is decided when the run is started: its weight}."""


class ChaosRun:
    """A run in `folder` and the faults that hit it."""

    def __init__(self, folder: Path, faults: int, seed: int, log: Any) -> None:
        from tests.audit import STAGES, TINY, Story
        from tests.sample import build

        (folder / "corpora").mkdir()
        self.faults, self.log = faults, log
        self.source, self.context = random.Random(seed), preload()
        self.total = ITERATIONS_PER_FAILURE * (faults + 2) * BATCH
        self.story = Story(None, build(folder / "corpora"), folder / "story")
        settings = TINY | {
            "training": TINY["training"] | {"train_samples": self.total},
            "logging": {"log_interval": 50},
        }
        import yaml

        (self.story.folder / "run.yaml").write_text(yaml.safe_dump(settings))
        self.stages = [stage | {"at": stage["at"] * self.total // 320} for stage in STAGES]
        self.story.write(self.stages)
        self.done: Counter[str] = Counter()
        self.instants: Counter[str] = Counter()
        self.down: list[float] = []
        self.launches = 0
        self.begin, self.seconds = time.monotonic(), 0.0
        self.kept = 0
        self.note = self.story.folder / "instant"

    def more(self) -> bool:
        """Return whether faults are left."""
        return sum(self.done.values()) < self.faults

    def choose(self, kinds: Mapping[str, int]) -> str:
        """Choose a kind of failure by weight."""
        return self.source.choices(list(kinds), list(kinds.values()))[0]

    def count(self, kind: str, where: str) -> None:
        """Record a failure."""
        self.done[kind] += 1
        self.seconds = time.monotonic() - self.begin
        self.log(f"failure {sum(self.done.values())} of {self.faults}: {kind} {where}", flush=True)

    def words(self, run: Path) -> list[str]:
        """Return the command of the run."""
        words = [
            "--save",
            str(run),
            "--load",
            str(run),
            "--save-interval",
            "5",
            "--async-save",
            "--most-recent-k",
            "2",
        ]
        return [*words, "--eval-interval", "10", "--eval-iters", "1", *LAYOUT]

    def launch(self, kinds: Mapping[str, int]) -> bool:
        """Start the run, cause faults, and wait for its end; returns whether it is complete."""
        from megatron_chatflow.checkpoint.run_directory import complete_iterations

        source, run, words, failure = self.source, self.story.run, self.words(self.story.run), {}
        note = self.note = self.story.folder / f"instant{self.launches}"
        there = complete_iterations(run) if run.exists() else []
        if self.more() and source.random() < sum(AT_LAUNCH.values()) / (
            sum(AT_LAUNCH.values()) + sum(kinds.values())
        ):
            kind = self.choose(AT_LAUNCH)
            if kind == "kill -9 at a file operation":
                failure = {source.randrange(WORLD): (run, source.randrange(1, 150), note)}
            elif len(there) > 1 and kind == "damaged checkpoint":
                damage_newest(run, source)
                self.kept = there[1]
                self.count(kind, f"{there[0]}")
            elif len(there) > 1:
                words += ["--ckpt-step", str(there[1])]
                self.kept = there[1]
                self.count(kind, f"to {there[1]} from {there[0]}")
        launch = Launch(self.context, self.story.folder, self.launches, words, failure)
        self.launches += 1
        begin = time.monotonic()
        try:
            ended = self.cause_faults(launch, kinds)
            codes = launch.wait(DOWN if ended else 900)
            assert None not in codes, (
                f"not every process had exited {time.monotonic() - begin:.0f} s after the "
                f"failure:\n{launch.text()}"
            )
        finally:
            launch.end()
        if note.exists():
            self.count("kill -9 at a file operation", f"({note.read_text().strip()})")
            self.instants[re.sub(r"[0-9a-f]{6,}|\d+", "N", note.read_text().strip())] += 1
        repair_notes(launch.notes)
        if any(path.stat().st_size for path in launch.notes.iterdir()):
            self.story.launches.append(launch.notes)
        said = launch.text()
        assert "Traceback" not in said, said
        if self.kept and "loaded" in said:
            assert f"resuming after iteration {self.kept}" in said, f"not from {self.kept}:\n{said}"
        assert set(codes) <= {0, 1, 3, -9}, f"{codes}\n{said}"
        self.check_newest()
        return set(codes) == {0}

    def cause_faults(self, launch: Launch, kinds: Mapping[str, int]) -> bool:
        """Cause faults at random moments of a launch until one ends it; returns whether one did."""
        source = self.source
        while self.more():
            target = (
                max(launch.samples(), self.kept * BATCH)
                + source.randrange(1, 2 * ITERATIONS_PER_FAILURE) * BATCH
            )
            while launch.samples() < target and None in launch.wait(0):
                time.sleep(0.01)
                if set(launch.wait(0)) != {None}:  # killed at a file operation, or at the end
                    return True
            if None not in launch.wait(0):
                return False
            time.sleep(source.random() * 0.3)
            kind, victim = self.choose(kinds), source.choice(launch.ranks)
            if kind == "kill -9 of a writer" and not kill_writer(victim.pid):
                # its writer was killed before, and the next save has not yet begun another
                kind = "kill -9"
            self.count(kind, f"at sample {launch.samples()} of {self.total}")
            if kind == "full disk":
                fill(self.story.run.parent, 1.0)
            elif kind == "stopped for 3 s":
                os.kill(victim.pid, signal.SIGSTOP)
                time.sleep(3)
                os.kill(victim.pid, signal.SIGCONT)
            elif kind == "second run":
                self.second_run()
            elif kind != "kill -9 of a writer":
                self.end(launch, kind, victim)
                return True
        return False

    def second_run(self) -> None:
        """Start another launch in the directory: all its ranks refuse, the first run continues."""
        second = Launch(
            self.context,
            self.story.folder,
            10**5 + self.launches * 1000 + sum(self.done.values()),
            self.words(self.story.run),
        )
        try:
            codes = second.wait(DOWN)
            assert set(codes) == {2}, f"a second run: {codes}\n{second.text()}"
            assert not any(path.stat().st_size for path in second.notes.iterdir()), (
                "a second run has read samples"
            )
        finally:
            second.end()

    def end(self, launch: Launch, kind: str, victim: Any) -> None:
        """Cause a failure that ends a launch: every process must exit within `DOWN` seconds."""
        begin = time.monotonic()
        number = {"kill -9": signal.SIGKILL, "stopped": signal.SIGSTOP}.get(kind) or signal.Signals[
            kind
        ]
        os.kill(victim.pid, number)
        if kind == "stopped":
            others = [process for process in launch.ranks if process is not victim]
            for process in others:
                process.join(max(0.0, begin + DOWN - time.monotonic()))
            assert all(process.exitcode is not None for process in others), (
                f"not down {DOWN:.0f} s after a rank was stopped:\n{launch.text()}"
            )
            self.down.append(time.monotonic() - begin)
            victim.kill()
        codes = launch.wait(DOWN)
        assert None not in codes, (
            f"the job was not down {DOWN:.0f} s after {kind}:\n{launch.text()}"
        )
        if kind in ("kill -9", "stopped"):
            self.down += [time.monotonic() - begin] if kind == "kill -9" else []
            assert set(codes) <= {1, -9, 0, 3} and -9 in codes, f"{codes}\n{launch.text()}"
        elif (
            not self.note.exists()
        ):  # else a rank was killed at a file operation while the job was exiting
            assert set(codes) in ({3}, {0}), f"{codes}\n{launch.text()}"

    def check_newest(self) -> None:
        """Check that the checkpoint from which the next launch will resume is intact."""
        from megatron_chatflow.checkpoint import integrity
        from megatron_chatflow.checkpoint.run_directory import find_intact_checkpoint

        if self.story.run.exists():
            found, _ = find_intact_checkpoint(self.story.run, None, {})
            if found is not None:
                assert integrity.damage(found, lambda *_: True) is None
                self.kept = int(found.name[5:])


def run_chaos(folder: Path, faults: int, seed: int, log: Any = print) -> dict[str, Any]:
    """Run the test in `folder`; returns what was done. Raises AssertionError where it fails."""
    from megatron_chatflow.cli.compare import differences
    from tests.audit import BOUND, read_notes

    it = ChaosRun(folder, faults, seed, log)
    story = it.story
    with small_disk(96) as (disk, can_fill):
        story.run = disk / "run"
        if not can_fill:
            log("the disk is not filled: a tmpfs cannot be mounted here (not root?)")
        kinds = {
            kind: weight
            for kind, weight in AT_RANDOM_MOMENTS.items()
            if can_fill or kind != "full disk"
        }
        while not it.launch(kinds):
            pass
        served = read_notes(story.launches)
        assert (
            len(served.names) == it.total
            and not any(served.repeated().values())
            and not any(served.skipped().values())
        ), len(served.names)
        assert served.farthest([(0, it.stages)]) <= BOUND
        down = max(it.down, default=0.0)
        log(
            (
                f"{it.launches} launches, {dict(it.done)} in {it.seconds / 60:.1f} minutes; "
                f"{it.total} samples, each read once; "
                f"down after {down:.1f} s at most"
            ),
            flush=True,
        )
        undisturbed = Launch(
            it.context, story.folder, 10**6, it.words(story.folder / "undisturbed")
        )
        try:
            assert set(undisturbed.wait(3600)) == {0}, undisturbed.text()
        finally:
            undisturbed.end()
        assert read_notes([undisturbed.notes]) == served, (
            "the undisturbed run has read other samples"
        )
        found = list(differences(story.run, story.folder / "undisturbed", None))
        assert not found, found[:5]
    return {
        "faults": dict(it.done),
        "launches": it.launches,
        "samples": it.total,
        "minutes": it.seconds / 60,
        "longest_down": down,
        "instants": dict(it.instants),
    }


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--faults", type=int, default=60, help="number of faults. Default: 60.")
    args = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        result = run_chaos(Path(folder), args.faults, args.seed)
    print("the losses and the last checkpoint have the bits of the undisturbed run")
    print(
        markdown(
            {"failure": Counter(result["faults"]), "killed before": Counter(result["instants"])}
        )
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
