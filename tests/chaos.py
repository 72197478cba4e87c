"""Chaos: a run of TP2 x DP2 with asynchronous saves is killed, stopped and robbed of its disk again and again, and must not show it at its end.

    python tests/chaos.py                          # 60 faults, about fifteen minutes on two cores
    python tests/chaos.py --faults 15 --seed 15    # five minutes

A fault is one of: kill -9 of a random rank, or of the process that writes its shards; SIGTERM or SIGUSR1 to a random rank; the disk full for a
second. It comes at a random moment of training, validation or saving. Where the run has ended it is started again; it must go on from the checkpoint
that the pointer names, and that one must be sound. At the end every loss and every bit of the checkpoint must be those of a run that nothing happened
to, and the audit must find every sample read once.
Filling the disk needs a small tmpfs of its own, and root to mount it; without that this fault is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WORLD, BATCH = 4, 16
LAYOUT = ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--ema-decay", "0.9"]
ITERATIONS_A_FAULT = 20
DOWN = 60.0
"""Seconds in which a job must come down after one of its ranks is killed."""


def rank_main(rank: int, port: int, folder: Path, notes: Path, log: Path, words: list[str]) -> None:
    """One rank of a launch: the real command, with a loader that writes down what it hands out. Its output goes to `log`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
    from megatron_chatflow.__main__ import main
    from megatron_chatflow.training import loop
    from tests.audit import recording_loader

    try:
        loop.Loader = recording_loader(notes)
        code = main(["train", "--config", str(folder / "run.yaml"), *words])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def preload() -> Any:
    """Processes that have imported the heavy libraries when they start: a launch takes one second instead of ten."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos_preload"])
    return context


class Launch:
    """Four ranks."""

    def __init__(self, context: Any, folder: Path, number: int, words: list[str]) -> None:
        self.notes, self.logs = folder / f"launch{number}", folder / f"logs{number}"
        self.notes.mkdir()
        self.logs.mkdir()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.ranks = [
            context.Process(target=rank_main, args=(rank, port, folder, self.notes, self.logs / f"{rank}.log", words)) for rank in range(WORLD)
        ]
        for process in self.ranks:
            process.start()

    def samples(self) -> int:
        """The sample that rank 0 has got to."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return json.loads((self.notes / "rank0.jsonl").read_text().splitlines()[-1])[0]
        return -1

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes when all ranks have ended, or after so many seconds (then None for those that have not)."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def text(self) -> str:
        """What the ranks said."""
        return "".join(f"--- rank {rank}\n{(self.logs / f'{rank}.log').read_text()}" for rank in range(WORLD) if (self.logs / f"{rank}.log").exists())

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.ranks:
            process.kill()
            process.join()


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[tuple[Path, bool]]:
    """(a folder, whether it is a disk of its own that can be filled)."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-disk-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True).returncode == 0
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
    """Kill the process that writes a rank's shards, the one of its children with the lowest priority; returns whether there was one."""
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


def torment(folder: Path, faults: int, seed: int, say: Any = print) -> dict[str, Any]:
    """The whole story in `folder`; returns what was done. Raises AssertionError where the run shows it."""
    import yaml

    from megatron_chatflow.training import manifest
    from megatron_chatflow.training.run_directory import find_sound_checkpoint
    from tests.audit import BOUND, STAGES, TINY, Story, read_notes
    from tests.sample import build
    from tools.compare_runs import differences

    (folder / "corpora").mkdir()
    corpora = build(folder / "corpora")
    source, context = random.Random(seed), preload()
    total = ITERATIONS_A_FAULT * (faults + 2) * BATCH
    settings = TINY | {"training": TINY["training"] | {"train_samples": total}, "logging": {"log_interval": 50}}
    stages = [stage | {"at": stage["at"] * total // 320} for stage in STAGES]
    story = Story(None, corpora, folder / "story")
    (story.folder / "run.yaml").write_text(yaml.safe_dump(settings))
    story.write(stages)
    done: Counter[str] = Counter()
    down: list[float] = []
    with small_disk(24) as (disk, can_fill):
        story.run = disk / "run"
        if not can_fill:
            say("the disk is not filled: a tmpfs cannot be mounted here (not root?)")
        kinds = ["kill -9", "kill -9", "kill -9 of a writer", "SIGTERM", "SIGUSR1", *(["full disk"] if can_fill else [])]
        words = ["--save", str(story.run), "--load", str(story.run), "--save-interval", "5", "--async-save", "--most-recent-k", "2"]
        words += ["--eval-interval", "10", "--eval-iters", "1", *LAYOUT]
        launches = 0
        kept = 0
        while True:
            launch = Launch(context, story.folder, launches, words)
            launches += 1
            try:
                while sum(done.values()) < faults:
                    first = launch.samples()
                    target = source.randrange(1, 2 * ITERATIONS_A_FAULT) * BATCH
                    while launch.samples() < max(first, kept * BATCH) + target and None in launch.wait(0):
                        time.sleep(0.01)
                    if None not in launch.wait(0):
                        break
                    time.sleep(source.random() * 0.3)
                    kind, victim = source.choice(kinds), source.choice(launch.ranks)
                    if kind == "kill -9 of a writer" and not kill_writer(victim.pid):
                        kind = "kill -9"  # its writer was killed before, and the next save has not yet begun another
                    done[kind] += 1
                    say(f"fault {sum(done.values())} of {faults}: {kind} at sample {launch.samples()} of {total}", flush=True)
                    if kind == "full disk":
                        fill(disk, 1.0)
                    if kind in ("full disk", "kill -9 of a writer"):
                        continue
                    begin = time.monotonic()
                    os.kill(victim.pid, signal.SIGKILL if kind == "kill -9" else signal.Signals[kind])
                    codes = launch.wait(DOWN)
                    assert None not in codes, f"the job was not down {DOWN:.0f} s after {kind}:\n{launch.text()}"
                    if kind == "kill -9":
                        down.append(time.monotonic() - begin)
                        assert set(codes) <= {1, -9, 0, 3} and -9 in codes, f"{codes}\n{launch.text()}"
                    else:
                        assert set(codes) in ({3}, {0}), f"{codes}\n{launch.text()}"
                    break
                codes = launch.wait(600)
                assert None not in codes, f"the run hangs:\n{launch.text()}"
            finally:
                launch.end()
            repair_notes(launch.notes)
            if any(path.stat().st_size for path in launch.notes.iterdir()):
                story.launches.append(launch.notes)
            said = launch.text()
            if kept:
                assert f"going on after iteration {kept}" in said or "rank 0" not in said or "going on" not in said, said
                assert f"going on after iteration {kept}" in said or "loaded" not in said, said
            assert set(codes) <= {0, 1, 3, -9}, f"{codes}\n{said}"
            if set(codes) == {0}:
                break
            if story.run.exists():
                found, notes = find_sound_checkpoint(story.run, None, {})
                assert not notes, notes
                if found is not None:
                    assert manifest.damage(found, lambda *_: True) is None
                    kept = int(found.name[5:])
        served = read_notes(story.launches)
        assert len(served.names) == total and not any(served.repeated().values()) and not any(served.skipped().values()), len(served.names)
        assert served.farthest([(0, stages)]) <= BOUND
        say(f"{launches} launches, {dict(done)}; {total} samples, each read once; down after {max(down, default=0):.1f} s at most", flush=True)
        calm = Launch(context, story.folder, 10**6, [word.replace(str(story.run), str(story.folder / "calm")) for word in words])
        try:
            assert set(calm.wait(1800)) == {0}, calm.text()
        finally:
            calm.end()
        assert read_notes([calm.notes]) == served, "the calm run has read other samples"
        found = list(differences(story.run, story.folder / "calm", None))
        assert not found, found[:5]
    return {"faults": dict(done), "launches": launches, "samples": total, "longest_down": max(down, default=0.0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        result = torment(Path(folder), args.faults, args.seed)
    print("the losses and the last checkpoint have the bits of the run that nothing happened to")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
