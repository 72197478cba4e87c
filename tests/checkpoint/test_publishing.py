"""What a published checkpoint holds is what its writers wrote, or it is not published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.checkpoint import integrity
from megatron_chatflow.checkpoint.run_directory import find_intact_checkpoint, latest_iteration
from tests.checkpoint.test_saving import train_with_writer
from tests.pool import Pool
from tests.sample import metrics, train

SHORT = ["--train-iters", "6", "--lr-decay-iters", "20", "--save-interval", "2"]
TP = ["--tensor-model-parallel-size", "2"]


def ok(results: list[tuple[int, str, str]]) -> str:
    assert {code for code, _, _ in results} == {0}, results
    return results[0][1]


@pytest.fixture(scope="module")
def saved_run(pool: Pool, sample: Path) -> Path:
    """Six iterations on two ranks, saved every second."""
    run = sample / "saved_run"
    ok(pool.run(2, train, sample, "--save", str(run), *SHORT, *TP))
    return run


def vanish(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def shorten(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def take_common(folder: Path) -> None:
    (folder / "common.pt").unlink()


def change_common(folder: Path) -> None:
    path = folder / "common.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def add_another(folder: Path) -> None:
    (folder / "__7_0.distcp").write_bytes(b"of another run")


CHANGES: dict[int, tuple[Callable[[Path], None], str, str]] = {
    1: (vanish, "__1_0.distcp", "__1_0.distcp was written and is not there"),
    2: (shorten, "__1_0.distcp", "__1_0.distcp has "),
    3: (take_common, "__0_0.distcp", "No such file or directory"),
    4: (change_common, "__0_0.distcp", "common.pt is not what was written"),
    5: (add_another, "__0_0.distcp", "__7_0.distcp was not written by this run"),
}
"""{iteration: (what happens to its folder, the shard after which it does, the message)}."""


def serve_with_changes(serve: Callable[[Connection], None], connection: Connection) -> None:
    """A process that writes shards, in whose folders something else changes files."""
    from megatron_chatflow.checkpoint import writer_process

    write = writer_process.write_shards

    def write_shards(transforms: list[Any], buckets: list[Any]) -> Any:
        answer = write(transforms, buckets)
        for path, name, _ in buckets:
            iteration = int(Path(path).parent.name[5:12])
            if iteration in CHANGES and CHANGES[iteration][1] == name:
                CHANGES[iteration][0](Path(path).parent)
        return answer

    writer_process.write_shards = write_shards
    serve(connection)


def train_with_changes(folder: Path, *words: str) -> tuple[int, str, str]:
    """`train` with such a process on every rank."""
    from megatron_chatflow.checkpoint.writer_process import _serve

    return train_with_writer(partial(serve_with_changes, _serve), folder, *words)


def test_a_checkpoint_that_is_not_what_was_written_is_not_published(
    pool: Pool, sample: Path, saved_run: Path
) -> None:
    run = sample / "changed"
    words = ["--save", str(run), *SHORT, "--save-interval", "1", *TP]
    out = ok(pool.run(2, train_with_changes, sample, *words))
    lines = [line for line in out.splitlines() if "training continues" in line]
    assert len(lines) == len(CHANGES), out
    for (iteration, (_, _, problem)), line in zip(CHANGES.items(), lines, strict=True):
        assert f"the checkpoint of iteration {iteration} " in line and problem in line, line
    names = [path.name for path in run.glob("iter_*")]
    assert names == ["iter_0000006"] and latest_iteration(run) == 6
    assert metrics(run) == metrics(saved_run)


def train_and_lose_a_shard(folder: Path, *words: str) -> tuple[int, str, str]:
    """`train` where a shard of iteration 4 vanishes when its folder has its last name."""
    from megatron_chatflow.checkpoint import saver

    check = saver.check_files

    def lose(checkpoint: Path, records: integrity.FileRecords) -> None:
        if checkpoint.name == "iter_0000004":
            (checkpoint / "__0_0.distcp").unlink()
        check(checkpoint, records)

    saver.check_files = lose
    try:
        return train(folder, *words)
    finally:
        saver.check_files = check


def test_what_a_failed_save_would_replace_stays(pool: Pool, sample: Path, saved_run: Path) -> None:
    run = sample / "not replaced"
    shutil.copytree(saved_run, run)
    before = (run / "iter_0000004" / "manifest.json").read_bytes()
    words = ["--save", str(run), "--load", str(run), "--ckpt-step", "2", *SHORT]
    ((code, _, err),) = pool.run(
        1, train_and_lose_a_shard, sample, *words, "--train-iters", "4", "--exit-on-failed-save"
    )
    assert code == 1 and "iteration 4 is not published: __0_0.distcp was written" in err, err
    assert latest_iteration(run) == 2
    assert (run / "iter_0000004" / "manifest.json").read_bytes() == before
    assert integrity.damage(run / "iter_0000004", lambda *_: True) is None
    assert not list(run.glob("*.partial*"))


def test_a_shard_that_only_metadata_names_is_missed(
    pool: Pool, sample: Path, saved_run: Path
) -> None:
    """A manifest that is right about what is there, as version 0.2 wrote after a shard was lost."""
    for leave, message in ((True, "is not in manifest.json"), (False, "is missing")):
        run = sample / f"only in metadata {leave}"
        shutil.copytree(saved_run, run)
        folder = run / "iter_0000006"
        shard = folder / "__1_0.distcp"
        content = shard.read_bytes()
        shard.unlink()
        integrity.write_manifest(folder, integrity.record_files(folder))
        if leave:
            shard.write_bytes(content)
        assert integrity.damage(folder, lambda *_: True) is None
        words = ["--save", str(run), "--load", str(run), *SHORT, *TP]
        out = ok(pool.run(2, train, sample, *words))
        expected = f"__1_0.distcp, which .metadata refers to, {message}"
        assert out.count("going back to") == 1 and expected in out, out
        assert metrics(run) == metrics(saved_run)


@pytest.mark.parametrize("name", integrity.REQUIRED)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_required_file_that_is_missing_is_named(
    saved_run: Path, tmp_path: Path, name: str, with_manifest: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved_run, run)
    folder = run / "iter_0000006"
    state = json.loads((folder / "state.json").read_text())
    if not with_manifest:
        state = {key: value for key, value in state.items() if key != "sealed"}
        (folder / "state.json").write_text(json.dumps(state))
    (folder / name).unlink()
    (folder / integrity.NAME).unlink()
    if with_manifest:
        integrity.write_manifest(folder, integrity.record_files(folder))
    found, notes = find_intact_checkpoint(run, None, {})
    assert found == run / "iter_0000004" and len(notes) == 1, notes
    part = "names iteration 6" if name == "state.json" else f"{name} is missing"
    assert part in notes[0], notes


def test_no_required_file_may_be_out_of_the_manifest(saved_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000006"
    shutil.copytree(saved_run / folder.name, folder)
    records = integrity.record_files(folder)
    for name in integrity.REQUIRED:
        integrity.write_manifest(folder, {k: v for k, v in records.items() if k != name})
        assert integrity.damage(folder, lambda *_: True) == f"manifest.json does not list {name}"


def test_readers_name_what_is_missing(saved_run: Path, tmp_path: Path) -> None:
    from megatron_chatflow.checkpoint.tensor_reader import CheckpointReader
    from megatron_chatflow.errors import ChatflowError

    for name in (".metadata", "common.pt", "__1_0.distcp"):
        folder = tmp_path / name / "iter_0000006"
        shutil.copytree(saved_run / folder.name, folder)
        (folder / name).unlink()
        with pytest.raises(ChatflowError) as error:
            CheckpointReader(folder)
        assert str(error.value) == (
            f"{folder} is damaged: {name} is missing; load another checkpoint with --ckpt-step"
        )
