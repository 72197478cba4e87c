"""Saving publishes complete checkpoints only; old ones are removed, damaged ones are skipped."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.checkpoint import integrity
from megatron_chatflow.checkpoint.run_directory import find_intact_checkpoint, outdated
from tests.pool import Pool
from tests.sample import metrics, train

TP = ["--tensor-model-parallel-size", "2"]
SLOW = pytest.mark.slow
SHORT = ["--train-iters", "6", "--lr-decay-iters", "20"]


def ok(results: list[tuple[int, str, str]]) -> str:
    assert {code for code, _, _ in results} == {0}, results
    return results[0][1]


def iterations(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("iter_*"))


@pytest.fixture(scope="module")
def uninterrupted(pool: Pool, sample: Path) -> Path:
    """Six iterations on two ranks, saved every second."""
    run = sample / "uninterrupted"
    ok(pool.run(2, train, sample, "--save", str(run), "--save-interval", "2", *SHORT, *TP))
    return run


@given(
    st.sets(st.integers(0, 10**6), min_size=1),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 50),
)
def test_what_is_kept_are_the_newest_and_the_multiples(
    there: set[int], newest: int | None, interval: int | None
) -> None:
    removed = outdated(there, newest, interval)
    kept = sorted(there - set(removed))
    assert set(removed) <= there and max(there) in kept
    if newest is None and interval is None:
        assert not removed
    else:
        wanted = newest or 2
        assert kept[-wanted:] == sorted(there)[-wanted:]
        assert all(interval and i % interval == 0 for i in kept[:-wanted])
        assert not interval or all(i % interval for i in removed)


def test_an_asynchronous_save_has_the_bits_of_a_synchronous_one(
    pool: Pool, sample: Path, uninterrupted: Path
) -> None:
    from megatron_chatflow.cli.compare import differences

    run = sample / "async"
    out = ok(
        pool.run(
            2,
            train,
            sample,
            "--save",
            str(run),
            "--save-interval",
            "2",
            "--async-save",
            *SHORT,
            *TP,
        )
    )
    assert out.count("saved") == 3 and "s of it without training" in out
    assert iterations(run) == [2, 4, 6] and list(differences(run, uninterrupted, None)) == []


def train_with_slow_copies(folder: Path, *words: str) -> tuple[int, str, str]:
    """`train` where the copy of what is saved takes longer than an iteration."""
    from megatron_chatflow.checkpoint.shared_memory import SharedTensorBuffer

    copy = SharedTensorBuffer.copy
    SharedTensorBuffer.copy = lambda self, buckets: (time.sleep(1), copy(self, buckets))[1]
    try:
        return train(folder, *words)
    finally:
        SharedTensorBuffer.copy = copy


def test_the_next_iteration_changes_nothing_that_is_not_yet_copied(
    pool: Pool, sample: Path, uninterrupted: Path
) -> None:
    from megatron_chatflow.cli.compare import differences

    run = sample / "slow copies"
    out = ok(
        pool.run(
            2,
            train_with_slow_copies,
            sample,
            "--save",
            str(run),
            "--save-interval",
            "2",
            "--async-save",
            *SHORT,
            *TP,
        )
    )
    assert (
        out.count("saved") == 3
        and iterations(run) == [2, 4, 6]
        and list(differences(run, uninterrupted, None)) == []
    )


@SLOW
@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--most-recent-k", "1"], [6]),
        (["--save-retain-interval", "3"], [3, 5, 6]),
        (["--save-retain-interval", "4", "--most-recent-k", "1"], [4, 6]),
    ],
)
def test_old_checkpoints_are_removed_according_to_the_flags(
    pool: Pool, sample: Path, flags: list[str], kept: list[int]
) -> None:
    run = sample / f"kept {flags[0]} {len(flags)}"
    (run / "iter_0000009.partial-dead").mkdir(parents=True)
    ok(pool.run(1, train, sample, "--save", str(run), "--save-interval", "1", *SHORT, *flags))
    assert iterations(run) == kept


def test_every_file_is_sealed(uninterrupted: Path) -> None:
    folder = uninterrupted / "iter_0000006"
    records = integrity.read_manifest(folder)
    assert set(records) == {path.name for path in folder.iterdir()} - {integrity.NAME}
    assert {
        ".metadata",
        "common.pt",
        "metadata.json",
        "state.json",
        "__0_0.distcp",
        "__1_0.distcp",
    } <= set(records)
    assert integrity.damage(folder, lambda *_: True) is None


def damage(path: Path, source: random.Random) -> str:
    """Flip one bit of a file, or cut its end off."""
    content = bytearray(path.read_bytes())
    place = source.randrange(len(content))
    if source.random() < 0.5:
        content[place] ^= 1 << source.randrange(8)
        path.write_bytes(content)
        return f"{path.name}: bit flipped in byte {place}"
    path.write_bytes(content[:place])
    return f"{path.name}: cut to {place} bytes"


def test_damage_in_200_places_is_found_and_the_checkpoint_before_is_taken(
    uninterrupted: Path, tmp_path: Path
) -> None:
    source, run = random.Random(7), tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    folder = run / "iter_0000006"
    files = sorted(path for path in folder.iterdir())
    for i in range(200):
        path = files[i % len(files)]
        before = path.read_bytes()
        what = damage(path, source)
        wrong = integrity.damage(folder, lambda *_: True)
        assert wrong, what
        found, notes = find_intact_checkpoint(run, None, {folder: wrong})
        assert found == run / "iter_0000004" and len(notes) == 1 and "is damaged" in notes[0], what
        path.write_bytes(before)
    assert find_intact_checkpoint(run, None, {}) == (folder, [])


@pytest.mark.parametrize(
    "name",
    [
        "__1_0.distcp",
        *(
            pytest.param(n, marks=SLOW)
            for n in ("state.json", ".metadata", "manifest.json", "common.pt")
        ),
    ],
)
def test_training_continues_from_the_checkpoint_before_a_damaged_one(
    pool: Pool, sample: Path, uninterrupted: Path, name: str
) -> None:
    run = sample / f"damaged {name}"
    shutil.copytree(uninterrupted, run)
    damage(run / "iter_0000006" / name, random.Random(1))
    out = ok(pool.run(2, train, sample, "--save", str(run), "--load", str(run), *SHORT, *TP))
    assert (
        out.count("iter_0000006 is damaged") == out.count("going back to") == 1
        and "resuming after iteration 4" in out
    ), out
    assert (
        metrics(run) == metrics(uninterrupted)
        and (run / "latest_checkpointed_iteration.txt").read_text() == "6\n"
    )
    assert integrity.damage(run / "iter_0000006", lambda *_: True) is None


@SLOW
def test_a_pointer_that_leads_nowhere_leads_to_the_newest_checkpoint(
    pool: Pool, sample: Path, uninterrupted: Path
) -> None:
    for text in ("7\n", "x", ""):
        run = sample / f"pointer {text.strip()}"
        shutil.copytree(uninterrupted, run)
        (run / "latest_checkpointed_iteration.txt").write_text(text)
        out = ok(pool.run(1, train, sample, "--save", str(run), "--load", str(run), *SHORT))
        assert out.count("going back to") == 1 and "iter_0000006" in out, out


def test_training_does_not_start_without_an_intact_checkpoint(
    pool: Pool, sample: Path, uninterrupted: Path
) -> None:
    run = sample / "all damaged"
    shutil.copytree(uninterrupted, run)
    for folder in run.glob("iter_*"):
        damage(folder / "__0_0.distcp", random.Random(2))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ((code, _, err),) = pool.run(1, train, sample, "--save", str(run), "--load", str(run), *SHORT)
    assert code == 2 and "holds no intact checkpoint" in err and err.count("is damaged") == 3
    ((code, _, err),) = pool.run(1, train, sample, "--load", str(run), "--ckpt-step", "4", *SHORT)
    assert code == 2 and "iter_0000004 is damaged" in err and "--ckpt-step another" in err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def no_large_files() -> None:
    """From here on no file of this process may grow beyond 20,000 bytes."""
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


def train_with_writer(
    serve: Callable[[Connection], None], folder: Path, *words: str
) -> tuple[int, str, str]:
    """`train` with `serve` as what writes shards."""
    from megatron_chatflow.checkpoint import writer_process

    before, writer_process._serve = writer_process._serve, serve
    try:
        return train(folder, *words)
    finally:
        writer_process._serve = before


def train_on_a_small_disk(folder: Path, *words: str) -> tuple[int, str, str]:
    """`train`, with a process that writes shards (a fork) which can write no large files."""
    from megatron_chatflow.checkpoint.writer_process import _serve

    return train_with_writer(
        lambda connection: (no_large_files(), _serve(connection)), folder, *words
    )


def train_in_small_memory(folder: Path, *words: str) -> tuple[int, str, str]:
    """`train` where the memory that a rank shares with its writer cannot be allocated."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    no_large_files()
    try:
        return train(folder, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@SLOW
@pytest.mark.parametrize("extra", [["--async-save"], [], ["--exit-on-failed-save"]])
@pytest.mark.parametrize("short_of", [train_on_a_small_disk, train_in_small_memory])
def test_a_full_disk_loses_no_checkpoint(
    pool: Pool,
    sample: Path,
    uninterrupted: Path,
    short_of: Callable[..., tuple[int, str, str]],
    extra: list[str],
) -> None:
    run = sample / f"{short_of.__name__} {extra}"
    ok(pool.run(2, train, sample, "--save", str(run), "--exit-interval", "2", *SHORT, *TP))
    words = ["--save", str(run), "--load", str(run), "--save-interval", "2", *SHORT, *TP]
    results = pool.run(2, short_of, sample, *words, *extra)
    assert [code for code, _, _ in results] == [1, 1], results
    _, out, err = results[0]
    assert out.count("training continues") == (0 if extra == ["--exit-on-failed-save"] else 2), out
    assert "chatflow train: stopped: the checkpoint of iteration" in err
    assert metrics(run)[-1]["iteration"] == (4 if extra == ["--exit-on-failed-save"] else 6)
    assert (
        iterations(run) == [2] and (run / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    )
    ok(pool.run(2, train, sample, *words))
    assert metrics(run) == metrics(uninterrupted)


def test_no_code_of_a_checkpoint_is_run(
    pool: Pool, sample: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    for name in (".metadata", "common.pt"):
        run = sample / f"evil {name}"
        shutil.copytree(uninterrupted, run)
        folder = run / "iter_0000006"
        (folder / name).write_bytes(pickle.dumps(Evil()))
        (folder / integrity.NAME).unlink()
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(
            json.dumps({key: value for key, value in state.items() if key != "sealed"})
        )
        integrity.write_manifest(
            folder, integrity.record_files(folder)
        )  # an attacker has the hashes right
        ((code, _, err),) = pool.run(1, train, sample, "--load", str(run), *SHORT)
        assert code == 2 and "is not read" in err, (code, err)
        assert not (tmp_path / "executed").exists()


def killed_at_each_request(connection: Connection) -> None:
    """A writer process that is killed at a request, as the kernel does when memory runs out."""
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_first_request(connection: Connection) -> None:
    """The same for the first process, a fork; later ones are new interpreters, not patched."""
    from megatron_chatflow.checkpoint import writer_process

    (
        killed_at_each_request
        if writer_process._serve is killed_at_first_request
        else writer_process._serve
    )(connection)


def killed_before(connection: Connection) -> None:
    """The same, where the first process is not even asked."""
    from megatron_chatflow.checkpoint import writer_process

    os.kill(
        os.getpid(), signal.SIGKILL
    ) if writer_process._serve is killed_before else writer_process._serve(connection)


@SLOW
@pytest.mark.parametrize("flags", [[], ["--async-save"]])
@pytest.mark.parametrize(
    ("serve", "kept"),
    [(killed_before, [2, 4, 6]), (killed_at_first_request, [4, 6]), (killed_at_each_request, [])],
)
def test_a_save_whose_writer_is_killed_fails_and_the_next_has_another(
    pool: Pool, sample: Path, serve: Callable[[Connection], None], kept: list[int], flags: list[str]
) -> None:
    run = sample / f"{serve.__name__} {len(flags)}"
    words = ["--save", str(run), "--save-interval", "2", *SHORT, *flags]
    ((code, out, err),) = pool.run(1, train_with_writer, serve, sample, *words, timeout=120.0)
    message = "rank 0: the process that writes was killed"
    assert iterations(run) == kept and (out + err).count(message) == (
        4 if not kept else 3 - len(kept)
    ), out + err
    assert code == (0 if kept else 1) and (
        "the checkpoint of iteration 6 cannot be written" in err
    ) == (not kept)
    assert all(integrity.damage(run / f"iter_{i:07}", lambda *_: True) is None for i in kept)
