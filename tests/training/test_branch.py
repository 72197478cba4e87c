"""`--branch-from`: a branch continues a trunk in its own directory, and resumes itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chatflow.checkpoint import lineage
from megatron_chatflow.checkpoint.branching import find_branch_checkpoint
from megatron_chatflow.checkpoint.lineage import Lineage, Origin
from megatron_chatflow.checkpoint.run_directory import begin_course, complete_iterations
from megatron_chatflow.curriculum import BlendPlan
from megatron_chatflow.errors import ChatflowError
from tests.checkpoint.run_folders import write_checkpoint
from tests.pool import Pool, command
from tests.sample import metrics, train

EVAL = ["--eval-interval", "10"]
COOLDOWN = [
    "--train-iters", "16", "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "6", "--min-lr",
    "0", "--lr-wsd-decay-style", "linear",
]  # fmt: skip


def words(trunk: Path, branch: Path, iteration: int = 10) -> list[str]:
    return ["--load", str(trunk), "--branch-from", str(iteration), "--save", str(branch)]


def ok(results: list[tuple[int, str, str]]) -> str:
    for code, out, err in results:
        assert code == 0, (out, err)
    return results[0][1]


def records(run: Path) -> list[dict[str, Any]]:
    """Every record of a run, validations too, without times and branch."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    left_out = ("time", "branch")
    return [
        {key: value for key, value in json.loads(line).items() if key not in left_out}
        for line in lines
    ]


def digest(run: Path) -> dict[str, str]:
    """{file: its SHA-256 and time} of a run directory."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        + str(path.stat().st_mtime_ns)
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def trunk(pool: Pool, sample: Path) -> Path:
    """Twelve iterations at a constant rate, saved every fifth, validated every tenth."""
    run = sample / "trunk"
    flags = ["--train-iters", "12", "--lr-decay-style", "constant", "--save-interval", "5"]
    ok(pool.run(1, train, sample, "--save", str(run), *flags, *EVAL))
    return run


def test_a_branch_has_the_bits_of_the_trunks_continuation(
    pool: Pool, sample: Path, reference: Path
) -> None:
    branch, before = sample / "same", digest(reference)
    out = ok(pool.run(1, train, sample, *words(reference, branch), *EVAL))
    assert f"branch of {reference} at iteration 10, in {branch}" in out
    assert "changed" not in out
    assert records(branch) == records(reference) and len(metrics(branch)) == 20
    code, text, _ = command("compare", str(reference), str(branch))
    assert code == 0, text
    assert digest(reference) == before
    assert (branch / "plan.json").read_text() == (reference / "plan.json").read_text()
    trunk_branch = json.loads((reference / "lineage.json").read_text())["branch"]
    recorded = json.loads((branch / "lineage.json").read_text())
    assert recorded["ancestors"] == [[trunk_branch, 10]] and recorded["branch"] != trunk_branch
    origin = {"run": str(reference.resolve()), "branch": trunk_branch, "iteration": 10}
    assert recorded["parent"] == origin


def test_a_cooldown_ends_the_schedule_and_every_change_is_listed(
    pool: Pool, sample: Path, trunk: Path
) -> None:
    branch, before = sample / "cooldown", digest(trunk)
    out = ok(pool.run(1, train, sample, *words(trunk, branch), *COOLDOWN, *EVAL))
    (line,) = [line for line in out.splitlines() if line.startswith("changed by the branch")]
    assert "from iteration 11 on: " in line and "lr_decay_style WSD (before: constant)" in line
    assert "train_samples 128 (before: 96)" in out
    rates = [record["learning-rate"] for record in metrics(branch)]
    assert rates[2:10] == [3e-3] * 8 and len(rates) == 16
    assert rates[11:] == pytest.approx([3e-3 * (6 - i) / 6 for i in range(1, 6)])
    assert metrics(branch)[:10] == metrics(trunk)[:10]
    assert digest(trunk) == before


def test_the_same_command_resumes_a_branch(pool: Pool, sample: Path, trunk: Path) -> None:
    """Stopped after its first checkpoint, and moved trunk, it ends with the same bits."""
    entire, parts = sample / "undisturbed", sample / "requeued"
    flags = [*COOLDOWN, *EVAL, "--save-interval", "3"]
    ok(pool.run(1, train, sample, *words(trunk, entire), *flags))
    out = ok(pool.run(1, train, sample, *words(trunk, parts), *flags, "--exit-interval", "13"))
    assert complete_iterations(parts) == [13, 12]
    branch = json.loads((parts / "lineage.json").read_text())["branch"]
    out = ok(pool.run(1, train, sample, *words(trunk, parts), *flags))
    assert "resuming after iteration 13" in out and "changed by the branch" not in out
    assert records(parts) == records(entire)
    assert json.loads((parts / "lineage.json").read_text())["branch"] == branch
    config = ["--config", str(parts / "config.yaml"), "--load", str(parts)]
    (done,) = pool.run(1, command, "train", *config)
    assert done[0] == 0 and "nothing to do" in done[1]


@pytest.mark.slow
def test_a_branch_that_was_killed_before_its_first_checkpoint_begins_again(
    pool: Pool, sample: Path, trunk: Path
) -> None:
    branch = sample / "killed"
    branch.mkdir()
    begin_course(branch, trunk / "iter_0000010", 10)
    half = (trunk / "metrics.jsonl").read_text().splitlines(keepends=True)
    (branch / "metrics.jsonl").write_text("".join(half)[:-20])
    ok(pool.run(1, train, sample, *words(trunk, branch), *COOLDOWN, *EVAL))
    assert [record["iteration"] for record in metrics(branch)] == list(range(1, 17))


def test_settings_that_are_not_the_schedules_end_are_refused_as_at_any_resume(
    pool: Pool, sample: Path, trunk: Path
) -> None:
    flags = [*COOLDOWN, "--lr", "1e-3", "--adam-beta2", "0.9"]
    ((code, _, err),) = pool.run(1, train, sample, *words(trunk, sample / "other rate"), *flags)
    assert code == 2 and "lr is 0.001 here and 0.003 in the checkpoint" in err
    assert "adam_beta2" in err and "lr_decay_style" not in err
    assert not (sample / "other rate").exists()


def test_a_branch_of_another_run_or_iteration_is_refused(
    pool: Pool, sample: Path, trunk: Path, reference: Path
) -> None:
    def refused(*flags: str) -> str:
        ((code, _, err),) = pool.run(1, train, sample, *flags)
        assert code == 2, err
        return err

    new = sample / "never made"
    assert "no complete checkpoint of it; give --branch-from one of 5, 10, 12" in refused(
        *words(trunk, new, 7)
    )
    assert "is the run to branch from" in refused(*words(trunk, trunk))
    link = sample / "link"
    link.symlink_to(trunk)
    assert "is the run to branch from" in refused(*words(trunk, link))
    assert "holds a run that is not a branch" in refused(*words(trunk, reference))
    assert "--save is missing" not in refused("--load", str(trunk), "--branch-from", "10")
    assert "save is missing" in refused("--load", str(trunk), "--branch-from", "10")
    assert "load is missing" in refused("--save", str(new), "--branch-from", "10")
    assert "finetune contradicts" in refused(*words(trunk, new), "--finetune")
    damaged = sample / "damaged trunk"
    shutil.copytree(trunk, damaged)
    shard = damaged / "iter_0000010" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    err = refused(*words(damaged, new), *COOLDOWN)
    assert "iter_0000010 is damaged" in err and "give --branch-from another" in err
    assert not (new / "lineage.json").exists() and not list(new.glob("iter_*"))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Lineage]:
    """A trunk with checkpoints 4 and 8, and a branch of 4 with checkpoint 6."""
    root = Lineage("root")
    for iteration in (4, 8):
        write_checkpoint(tmp_path / "trunk", iteration, root)
    branch = tmp_path / "branch"
    branch.mkdir()
    course, _ = begin_course(branch, tmp_path / "trunk" / "iter_0000004", 4)
    write_checkpoint(branch, 6, course)
    return tmp_path / "trunk", branch, course


def test_a_branch_knows_its_trunk_after_it_moved_or_lost_the_checkpoint(
    pair: tuple[Path, Path, Lineage], tmp_path: Path
) -> None:
    trunk, branch, course = pair
    assert course.parent == Origin(str(trunk.resolve()), "root", 4)
    moved = trunk.rename(tmp_path / "moved")
    assert find_branch_checkpoint(moved, 4, branch)[0] == branch / "iter_0000006"
    moved.rename(trunk)
    shutil.rmtree(trunk / "iter_0000004")
    assert find_branch_checkpoint(trunk, 4, branch)[0] == branch / "iter_0000006"
    for load, iteration in ((trunk, 8), (tmp_path / "elsewhere", 4)):
        with pytest.raises(ChatflowError, match="holds a branch of iteration 4 of"):
            find_branch_checkpoint(load, iteration, branch)


def test_a_trunk_that_began_again_in_the_same_folder_is_another_run(
    pair: tuple[Path, Path, Lineage],
) -> None:
    trunk, branch, _ = pair
    shutil.rmtree(trunk)
    write_checkpoint(trunk, 4, Lineage("another"))
    with pytest.raises(ChatflowError, match="holds a branch of iteration 4 of"):
        find_branch_checkpoint(trunk, 4, branch)


def test_a_branch_whose_lineage_is_lost_is_known_by_its_checkpoints(
    pair: tuple[Path, Path, Lineage],
) -> None:
    trunk, branch, _ = pair
    (branch / lineage.FILE).unlink()
    assert find_branch_checkpoint(trunk, 4, branch)[0] == branch / "iter_0000006"


def test_a_branch_keeps_where_its_trunk_took_its_weights_from(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", 3, Lineage("base"))
    for name in ("trunk", "branch"):
        (tmp_path / name).mkdir()
    course, _ = begin_course(tmp_path / "trunk", None, 0, base)
    origin = Origin(str(tmp_path / "base"), "base", 3)
    assert course.weights == origin and course.parent is None
    assert lineage.read_course(tmp_path / "trunk") == course
    checkpoint = write_checkpoint(tmp_path / "trunk", 5, course)
    branch, _ = begin_course(tmp_path / "branch", checkpoint, 5)
    assert branch.weights == origin and branch.parent == Origin(
        str(tmp_path / "trunk"), course.branch, 5
    )
    assert lineage.read_course(tmp_path / "branch") == branch


def test_plan_shows_what_a_branch_would_read(pool: Pool, sample: Path, trunk: Path) -> None:
    settings = yaml.safe_load((sample / "run.yaml").read_text())
    assert settings["training"]["train_iters"] == 20
    flags = ["--config", str(sample / "run.yaml"), "--train-iters", "16"]
    (done,) = pool.run(1, command, "plan", *flags, *words(trunk, sample / "planned"))
    assert done[0] == 0 and "128" in done[1], done
    ledger = json.loads((trunk / "plan.json").read_text())
    assert BlendPlan.from_json(json.dumps(ledger)).num_samples == 96
