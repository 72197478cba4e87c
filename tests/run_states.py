"""The run directory against a simple model of what must be loadable.

Hypothesis chooses what happens to the directory.

    python tests/run_states.py                      # a minute
    python tests/run_states.py --minutes 30         # thirty

Every step is the installed command in a separate process: training, with synchronous or
asynchronous saves, killed at a file operation of the run directory or undisturbed; back to an older
checkpoint; with iterations skipped; with another curriculum; with old checkpoints removed; and
between them checkpoints and the pointer are damaged, and checkpoints are averaged.

The model knows for each checkpoint what its weights were trained on: for every iteration the
curriculum in force and whether it was skipped (a *history*). After each step

- the pointer names a checkpoint that exists and, unless this test damaged it, is intact;
- checkpoints of equal histories have equal bits, whatever happened in between;
- the run continued from the newest intact checkpoint of its history, or from the one asked for;
- metrics.jsonl has each iteration up to the pointer's once, with the loss of that history (records
  of a course are cut when it is left: those are missing where the run is sent back to it);
- nothing printed a traceback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.run_states_world import (
    LONGEST,
    History,
    Saved,
    World,
    command,
    digest_of,
)
from tests.stress import make_parser, markdown, prepare_process

world: World


class RunDirectory(RuleBasedStateMachine):
    """One run directory."""

    @initialize()
    def start(self) -> None:
        self.run = Path(tempfile.mkdtemp(prefix="run-", dir=world.folder)) / "run"
        self.log = self.run.parent / "log"
        self.saved: dict[int, Saved] = {}
        self.pointer: int | None = None
        self.pointer_damaged = False
        self.launches = 0
        self.course: list[tuple[int, int]] = []
        """The current course: (branch, last iteration that belongs to it), oldest first."""
        self.course_file: bytes | None = None
        """What the run has written of it."""
        self.missing: set[int] = set()
        """Iterations that may have no record: it was cut when their course was left, and the run
        was sent back to it.
        """

    def teardown(self) -> None:
        shutil.rmtree(self.run.parent, ignore_errors=True)

    # --- what happens -------------------------------------------------------------------------

    @rule(
        more=st.integers(1, 4),
        asynchronous=st.booleans(),
        version=st.sampled_from([0, 0, 0, 1]),
        skip=st.sets(st.integers(1, 3), max_size=1),
        back=st.one_of(st.none(), st.none(), st.integers(0, 30)),
        keep=st.sampled_from([None, None, 2]),
        kill=st.one_of(st.none(), st.integers(1, 120)),
    )
    def train(
        self,
        more: int,
        asynchronous: bool,
        version: int,
        skip: set[int],
        back: int | None,
        keep: int | None,
        kill: int | None,
    ) -> None:
        """Train some iterations; from an older checkpoint with `back`, killed with `kill`."""
        intact = sorted(i for i, s in self.saved.items() if not s.damaged)
        step = intact[back % len(intact)] if back is not None and intact else None
        begun = self.pointer is not None or self.saved
        if step is None and begun and not self.candidates():
            self.refused(version)
            return
        begin = step if step is not None else max(self.candidates(), default=0)
        stop = min(begin + more, LONGEST)
        words = self.words(version) + ["--save-interval", "2", "--exit-interval", str(stop or 1)]
        words += ["--amend-curriculum"] if self.saved else []
        words += ["--async-save"] if asynchronous else []
        words += ["--most-recent-k", str(keep)] if keep else []
        words += ["--ckpt-step", str(step)] if step is not None else []
        skipped = sorted(begin + s for s in skip)
        words += ["--iterations-to-skip", *map(str, skipped)] if skipped else []
        if step is not None and step not in self.candidates():
            self.missing = set(range(1, begin + 1))
        note = self.run.parent / "instant"
        note.unlink(missing_ok=True)
        code, said = self.command(words, (self.run, kill, note) if kill else None)
        world.counts[
            "trained" + (", back" if step is not None else "") + (", skipping" if skipped else "")
        ] += 1
        killed = note.exists()
        if killed:
            world.counts["killed"] += 1
            world.instants[re.sub(r"[0-9a-f]{6,}|\d+", "N", note.read_text().strip())] += 1
        assert code in ((-9, 0, 1) if killed else (0,)), said
        if code != -9 or "loaded" in said:
            from_ = re.search(r"resuming after iteration (\d+)", said)
            assert from_ is None or int(from_[1]) == begin, (begin, said)
            assert (from_ is not None) == (begin > 0) or killed or begin == stop, (begin, said)
        self.observe(begin, stop, version, set(skipped), step is not None, keep, killed, said)

    @rule(
        which=st.integers(0, 30),
        how=st.sampled_from(["flip", "cut", "remove"]),
        file=st.integers(0, 30),
    )
    def damage(self, which: int, how: str, file: int) -> None:
        """Damage one file of a checkpoint."""
        if not self.saved:
            return
        iteration = sorted(self.saved)[which % len(self.saved)]
        files = sorted(path for path in self.folder(iteration).iterdir() if path.is_file())
        path = files[file % len(files)]
        if how == "remove":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            if how == "cut":
                del data[len(data) // 2 :]
            else:
                data[len(data) // 3] ^= 0x10
            path.write_bytes(bytes(data))
        self.saved[iteration].damaged = True
        if path.name == "state.json":
            if how == "remove":
                del self.saved[iteration]  # without it the folder is not a checkpoint
            else:
                self.saved[iteration].stamp = path.stat().st_mtime_ns
        world.counts[f"damaged: {how}"] += 1

    @rule(content=st.sampled_from([b"", b"\xff\xfe", "\u0663".encode(), b"9999", b"-1", None]))
    def damage_pointer(self, content: bytes | None) -> None:
        """Write something else into the pointer; the next launch that saves repairs it."""
        if self.pointer is None or content is None:
            return
        (self.run / "latest_checkpointed_iteration.txt").write_bytes(content)
        self.pointer_damaged = True
        world.counts["pointer damaged"] += 1

    @rule(count=st.integers(1, 3))
    def average(self, count: int) -> None:
        """Average the last checkpoints: intact ones of this course only, or refused."""
        if self.pointer is None or self.pointer_damaged:
            return
        from megatron_chatflow.checkpoint.selection import choose_weights
        from megatron_chatflow.errors import ChatflowError

        world.counts["averaged"] += 1
        try:
            folders = choose_weights(self.run, None, count).folders
        except ChatflowError:
            return
        latest = self.saved[self.pointer].history
        for folder in folders:
            history = self.saved[int(folder.name[5:])].history
            assert history == latest[: len(history)], f"{folder} is of another course"

    def refused(self, version: int) -> None:
        """Check that a launch without a loadable checkpoint is one message and writes nothing."""
        before = sorted(path.relative_to(self.run) for path in self.run.rglob("*"))
        code, said = self.command([*self.words(version), "--amend-curriculum"])
        assert (
            code == 2 and "no intact checkpoint" in said and len(said.strip().splitlines()) == 1
        ), said
        assert before == sorted(path.relative_to(self.run) for path in self.run.rglob("*"))
        world.counts["refused: nothing intact"] += 1
        self.teardown()
        self.start()

    # --- the model ----------------------------------------------------------------------------

    def written_course(self) -> bytes | None:
        path = self.run / "lineage.json"
        return path.read_bytes() if path.exists() else None

    def words(self, version: int) -> list[str]:
        """Return the command of a launch with curriculum `version`."""
        curriculum = world.folder / f"curriculum{version}.yaml"
        words = ["train", "--config", str(world.folder / "run.yaml")]
        words += ["--curriculum", str(curriculum)]
        return [*words, "--save", str(self.run), "--load", str(self.run)]

    def folder(self, iteration: int) -> Path:
        return self.run / f"iter_{iteration:07d}"

    def command(self, words: list[str], kill: tuple[Any, ...] | None = None) -> tuple[int, str]:
        """Return exit code and output of a command."""
        process = world.context.Process(target=command, args=(self.log, words, kill))
        process.start()
        process.join(120)
        hangs = process.exitcode is None
        if hangs:
            process.kill()
            process.join()
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        assert not hangs, f"hangs: {words}\n{said}"
        assert "Traceback" not in said, f"{words}\n{said}"
        return process.exitcode, said

    def candidates(self) -> list[int]:
        """Return the iterations of intact checkpoints on the current course."""
        limits = dict(self.course)
        is_lost = self.pointer is None or self.pointer_damaged  # the newest is taken
        return [
            i
            for i, s in self.saved.items()
            if not s.damaged and i <= limits.get(s.branch, -1) and (is_lost or i <= self.pointer)
        ]

    def history(self, begin: int, stop: int, version: int, skipped: set[int]) -> History:
        """Return the history of a launch from iteration `begin` to `stop`."""
        past: History = self.saved[begin].history if begin else ()
        amendments = past[-1][0] if past else ((0, version),)
        if amendments[-1][1] != version:
            amendments = (*amendments, (begin, version))
        return (*past, *((amendments, i in skipped) for i in range(begin + 1, stop + 1)))

    def observe(
        self,
        begin: int,
        stop: int,
        version: int,
        skipped: set[int],
        back: bool,
        keep: int | None,
        killed: bool,
        said: str,
    ) -> None:
        """Compare the folder with what may have happened, and update the model."""
        from megatron_chatflow.checkpoint import integrity
        from megatron_chatflow.checkpoint.run_directory import complete_iterations, latest_iteration

        history = self.history(begin, stop, version, skipped)
        left = [i for i in self.candidates() if i > begin]
        branched = self.written_course() != self.course_file
        assert branched or killed or not left, (
            f"no new branch from {begin}, with {left} left behind\n{said}"
        )
        self.missing = {i for i in self.missing if i <= begin}
        if branched:
            self.launches += 1
            self.course = [(branch, min(last, begin)) for branch, last in self.course] + [
                (self.launches, LONGEST)
            ]
            self.course_file = self.written_course()
        there = (
            {
                i: os.stat(self.folder(i) / "state.json").st_mtime_ns
                for i in complete_iterations(self.run)
            }
            if self.run.exists()
            else {}
        )
        fresh = {
            i for i, stamp in there.items() if i not in self.saved or self.saved[i].stamp != stamp
        }
        gone = set(self.saved) - set(there)
        assert fresh <= {i for i in range(begin + 1, stop + 1) if i % 2 == 0 or i == stop}, (
            fresh,
            begin,
            stop,
            said,
        )
        # A checkpoint of a course that was left is removed right before another of its iteration
        # takes its place.
        replaced = {i for i in gone if begin < i <= stop} if killed else set()
        assert gone <= replaced or keep, (gone, said)
        if not killed and stop > begin:
            assert stop in fresh, (fresh, begin, stop, said)
        for i in gone:
            del self.saved[i]
        for i in fresh:
            self.saved[i] = Saved(history[:i], there[i], self.course[-1][0])
        pointer = latest_iteration(self.run) if fresh or not self.pointer_damaged else self.pointer
        sent_back = {begin} if begin else set()  # written before the course is
        assert pointer in {self.pointer, *sent_back, *fresh}, (pointer, self.pointer, fresh, said)
        if not killed and fresh:
            assert pointer == stop, (pointer, stop, said)
        self.pointer_damaged = self.pointer_damaged and not fresh
        self.pointer = pointer
        for i in fresh:
            wrong = integrity.damage(self.folder(i), lambda *_: True)
            assert wrong is None, wrong
            digest = digest_of(self.folder(i))
            assert world.bits.setdefault(history[:i], digest) == digest, (
                f"other bits at iteration {i}: {history[:i]}\n{said}"
            )
        if pointer is not None and pointer in fresh and not killed:
            self.compare_metrics(history[:pointer])

    def records(self) -> list[dict[str, Any]]:
        """Return the records of iterations in metrics.jsonl, without a partial line at its end."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [
            record
            for record in (json.loads(line) for line in lines if line.endswith("\n"))
            if "samples" in record
        ]

    def compare_metrics(self, history: History) -> None:
        """Check that each iteration is recorded once, with the loss of its history."""
        records = self.records()
        found = [record["iteration"] for record in records]
        assert found == [
            i for i in range(1, len(history) + 1) if i in found or i not in self.missing
        ], found
        for record in records:
            i = record["iteration"]
            loss = record.get("lm loss")
            assert world.losses.setdefault(history[:i], loss) == loss, (
                i,
                loss,
                world.losses[history[:i]],
            )


def explore(folder: Path, minutes: float, number: int) -> dict[str, Any]:
    """Run hypothesis for this many minutes; returns what was done.

    Raises AssertionError, with the steps, where the directory contradicts the model.
    """
    global world
    world = World(folder)
    end, examples = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        chosen = settings(
            max_examples=3, stateful_step_count=12, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if minutes > 5 else [Phase.generate],
            print_blob=False,
        )  # fmt: skip
        run_state_machine_as_test(
            seed(number + examples)(type("Machine", (RunDirectory,), {})), settings=chosen
        )
        examples += 1
    return {
        "examples": 3 * examples, "steps": dict(world.counts), "histories": len(world.bits),
        "instants of kills": len(world.instants),
    }  # fmt: skip


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long. Default: 1.")
    args = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory(prefix="states-") as folder:
        result = explore(Path(folder), args.minutes, args.seed)
    print(markdown({"steps": world.counts, "killed before": world.instants}))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
