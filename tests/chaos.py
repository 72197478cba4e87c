"""Chaos: a run of TP2 x DP2 with asynchronous saves meets faults again and again, and its result
must not show it.

    python tests/chaos.py                          # 60 faults, about twenty minutes on two cores
    python tests/chaos.py --faults 200             # an hour
    python tests/chaos.py --faults 15 --seed 15    # five minutes

Faults at a random moment of training, validation or saving: kill -9 of a random rank, or of the
process that writes its shards; SIGTERM, SIGUSR1, SIGINT or SIGHUP to a random rank; a rank stopped
for three seconds, or until the others have exited; the disk full for a second; a second run that is
started in the same directory. Faults at a chosen instant: a rank is killed right before its n-th
file operation below the run directory (writing, fsync, rename, mkdir, remove). Faults between
launches: a file of the newest checkpoint is damaged; the run is sent back to an older checkpoint.

Where the run has ended it is started again. It must resume from the checkpoint that the pointer
names, or where that one is damaged from the one before, and the checkpoint must be intact. Every
process must be gone within 60 s, and no output may hold a traceback. At the end every loss and
every bit of the checkpoint must be those of a run that met no fault, and the audit must find every
sample read once. Filling the disk needs a small tmpfs of its own, and root to mount it; without
that this fault is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WORLD, BATCH = 4, 16
LAYOUT = ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--ema-decay", "0.9"]
ITERATIONS_A_FAULT = 20
DOWN = 60.0
"""Seconds in which a job must come down after one of its ranks is killed."""


AT_ONCE = {
    "kill -9": 3, "kill -9 of a writer": 1, "SIGTERM": 1, "SIGUSR1": 1, "SIGINT": 1, "SIGHUP": 1,
    "stopped for 3 s": 1, "stopped": 1, "full disk": 1,
    "second run": 1,
}  # fmt: skip
"""{fault at a random moment of a launch: its weight}."""
AT_LAUNCH = {"kill -9 at a file operation": 4, "damaged checkpoint": 1, "sent back": 1}
"""{fault that is decided when the run is started: its weight}."""


def rank_main(
    rank: int,
    port: int,
    folder: Path,
    notes: Path,
    log: Path,
    words: list[str],
    fault: tuple[Any, ...] | None,
) -> None:
    """One rank of a launch: the real command, with a loader that writes down what it hands out. Its
    output goes to `log`.
    """
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
    from megatron_chatflow.__main__ import main
    from megatron_chatflow.training import train_loop
    from tests.audit import recording_loader
    from tests.fault_points import kill_at

    if fault:
        kill_at(*fault)
    try:
        train_loop.BlendDataLoader = recording_loader(notes)
        code = main(["train", "--config", str(folder / "run.yaml"), *words])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def preload() -> Any:
    """Processes that have imported the heavy libraries when they start: a launch takes one second
    instead of ten.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos_preload"])
    return context


class Launch:
    """Four ranks."""

    def __init__(
        self,
        context: Any,
        folder: Path,
        number: int,
        words: list[str],
        faults: Mapping[int, tuple[Any, ...]] | None = None,
    ) -> None:
        """`faults`: for ranks that are to be killed the arguments of `fault_points.kill_at`."""
        self.notes, self.logs = folder / f"launch{number}", folder / f"logs{number}"
        self.notes.mkdir()
        self.logs.mkdir()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.ranks = [
            context.Process(
                target=rank_main,
                args=(
                    rank,
                    port,
                    folder,
                    self.notes,
                    self.logs / f"{rank}.log",
                    words,
                    (faults or {}).get(rank),
                ),
            )
            for rank in range(WORLD)
        ]
        for process in self.ranks:
            process.start()

    def samples(self) -> int:
        """The sample that rank 0 has got to."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return json.loads((self.notes / "rank0.jsonl").read_text().splitlines()[-1])[0]
        return -1

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes when all ranks have ended, or after so many seconds (then None for those
        that have not).
        """
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def text(self) -> str:
        """What the ranks said."""
        return "".join(
            f"--- rank {rank}\n{(self.logs / f'{rank}.log').read_text()}"
            for rank in range(WORLD)
            if (self.logs / f"{rank}.log").exists()
        )

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.ranks:
            process.kill()
            process.join()


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[tuple[Path, bool]]:
    """(a folder, whether it is a disk of its own that can be filled)."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-disk-"))
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
            capture_output=True,
        ).returncode
        == 0
    )
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def fill(disk: Path, seconds: float) -> None:
    """Leave no byte free for a while."""
    path = disk / "filler"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass
    time.sleep(seconds)
    path.unlink()


def kill_writer(rank: int) -> bool:
    """Kill the process that writes a rank's shards, the one of its children with the lowest
    priority; returns whether there was one.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(rank).children():
            if child.nice() == 19 and child.status() != psutil.STATUS_ZOMBIE:
                child.kill()
                return True
    return False


def repair_notes(notes: Path) -> None:
    """Cut half lines off: a rank may have been killed while it wrote."""
    for path in notes.glob("*.jsonl"):
        text = path.read_text()
        path.write_text(text[: text.rfind("\n") + 1])


def damage_newest(run: Path, source: random.Random) -> None:
    """Flip a bit of a file of the newest checkpoint, cut it off, or remove it."""
    from megatron_chatflow.checkpoint.run_directory import complete_iterations, iteration_folder

    folder = iteration_folder(run, complete_iterations(run)[0])
    path = source.choice(
        sorted(
            path
            for path in folder.iterdir()
            if path.is_file() and path.stat().st_size and path.name != "state.json"
        )
    )
    how = source.choice(["flip", "cut", "remove"])
    if how == "remove":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[source.randrange(len(data)) :]
    else:
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.write_bytes(bytes(data))


class Torment:
    """A run in `folder` and the faults that it meets."""

    def __init__(self, folder: Path, faults: int, seed: int, say: Any) -> None:
        from tests.audit import STAGES, TINY, Story
        from tests.sample import build

        (folder / "corpora").mkdir()
        self.faults, self.say = faults, say
        self.source, self.context = random.Random(seed), preload()
        self.total = ITERATIONS_A_FAULT * (faults + 2) * BATCH
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
        self.kept = 0
        self.note = self.story.folder / "instant"

    def more(self) -> bool:
        """Whether faults are left."""
        return sum(self.done.values()) < self.faults

    def choose(self, kinds: Mapping[str, int]) -> str:
        """A kind of fault by weight."""
        return self.source.choices(list(kinds), list(kinds.values()))[0]

    def count(self, kind: str, where: str) -> None:
        """Record a fault."""
        self.done[kind] += 1
        self.say(f"fault {sum(self.done.values())} of {self.faults}: {kind} {where}", flush=True)

    def words(self, run: Path) -> list[str]:
        """The command of the run."""
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
        """Start the run, let it meet faults, and wait for its end; returns whether it is
        complete.
        """
        from megatron_chatflow.checkpoint.run_directory import complete_iterations

        source, run, words, fault = self.source, self.story.run, self.words(self.story.run), {}
        note = self.note = self.story.folder / f"instant{self.launches}"
        there = complete_iterations(run) if run.exists() else []
        if self.more() and source.random() < sum(AT_LAUNCH.values()) / (
            sum(AT_LAUNCH.values()) + sum(kinds.values())
        ):
            kind = self.choose(AT_LAUNCH)
            if kind == "kill -9 at a file operation":
                fault = {source.randrange(WORLD): (run, source.randrange(1, 150), note)}
            elif len(there) > 1 and kind == "damaged checkpoint":
                damage_newest(run, source)
                self.kept = there[1]
                self.count(kind, f"{there[0]}")
            elif len(there) > 1:
                words += ["--ckpt-step", str(there[1])]
                self.kept = there[1]
                self.count(kind, f"to {there[1]} from {there[0]}")
        launch = Launch(self.context, self.story.folder, self.launches, words, fault)
        self.launches += 1
        begin = time.monotonic()
        try:
            met = self.meet(launch, kinds)
            codes = launch.wait(DOWN if met else 900)
            assert None not in codes, (
                f"not every process had exited {time.monotonic() - begin:.0f} s after the "
                f"fault:\n{launch.text()}"
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
        self.look()
        return set(codes) == {0}

    def meet(self, launch: Launch, kinds: Mapping[str, int]) -> bool:
        """Faults at random moments of a launch, until one ends it; returns whether one did."""
        source = self.source
        while self.more():
            target = (
                max(launch.samples(), self.kept * BATCH)
                + source.randrange(1, 2 * ITERATIONS_A_FAULT) * BATCH
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
        """Another launch in the same directory: refused, on every rank, while the first goes on."""
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
        """A fault that ends a launch: every process is gone within `DOWN` seconds."""
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
        ):  # else a rank was killed at a file operation while the job was leaving
            assert set(codes) in ({3}, {0}), f"{codes}\n{launch.text()}"

    def look(self) -> None:
        """The checkpoint that the next launch will resume from is intact."""
        from megatron_chatflow.checkpoint import integrity
        from megatron_chatflow.checkpoint.run_directory import find_sound_checkpoint

        if self.story.run.exists():
            found, _ = find_sound_checkpoint(self.story.run, None, {})
            if found is not None:
                assert integrity.damage(found, lambda *_: True) is None
                self.kept = int(found.name[5:])


def torment(folder: Path, faults: int, seed: int, say: Any = print) -> dict[str, Any]:
    """The whole story in `folder`; returns what was done. Raises AssertionError where the run shows
    it.
    """
    from megatron_chatflow.cli.compare import differences
    from tests.audit import BOUND, read_notes

    it = Torment(folder, faults, seed, say)
    story = it.story
    with small_disk(96) as (disk, can_fill):
        story.run = disk / "run"
        if not can_fill:
            say("the disk is not filled: a tmpfs cannot be mounted here (not root?)")
        kinds = {
            kind: weight for kind, weight in AT_ONCE.items() if can_fill or kind != "full disk"
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
        say(
            (
                f"{it.launches} launches, {dict(it.done)}; {it.total} samples, each read once; "
                f"down after {down:.1f} s at most"
            ),
            flush=True,
        )
        calm = Launch(it.context, story.folder, 10**6, it.words(story.folder / "calm"))
        try:
            assert set(calm.wait(3600)) == {0}, calm.text()
        finally:
            calm.end()
        assert read_notes([calm.notes]) == served, "the calm run has read other samples"
        found = list(differences(story.run, story.folder / "calm", None))
        assert not found, found[:5]
    return {
        "faults": dict(it.done),
        "launches": it.launches,
        "samples": it.total,
        "longest_down": down,
        "instants": dict(it.instants),
    }


def markdown(tables: Mapping[str, Counter[str]]) -> str:
    """Tables of counts for docs/reliability.md."""
    return "\n\n".join(
        "\n".join(
            [
                f"| {title} | times |",
                "|---|---|",
                *(f"| {name} | {count} |" for name, count in sorted(counts.items())),
            ]
        )
        for title, counts in tables.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    # nohup ignores SIGHUP, a shell's `&` SIGINT; the ranks would inherit that
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        result = torment(Path(folder), args.faults, args.seed)
    print("the losses and the last checkpoint have the bits of the run that nothing happened to")
    print(
        markdown({"fault": Counter(result["faults"]), "killed before": Counter(result["instants"])})
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
