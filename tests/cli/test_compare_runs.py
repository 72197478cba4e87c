"""tools/compare_runs.py: the same, different, or not two runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chatflow.cli.compare import main
from tests.pool import Pool
from tests.sample import train

TOOL = Path(__file__).parents[2] / "tools" / "compare_runs.py"


@pytest.mark.slow
def test_a_run_is_the_same_as_its_copy_and_as_itself_made_again(
    pool: Pool, sample: Path, reference: Path, capsys: pytest.CaptureFixture
) -> None:
    again = sample / "compared"
    (done,) = pool.run(
        1, train, sample, "--save", str(again), "--save-interval", "10", "--eval-interval", "10"
    )
    assert done[0] == 0, done
    assert main([str(reference), str(again)]) == 0
    assert capsys.readouterr().out.startswith("the same")


def test_the_first_difference_is_reported(
    pool: Pool, sample: Path, reference: Path, capsys: pytest.CaptureFixture
) -> None:
    other = sample / "compared other"
    words = [
        "--save",
        str(other),
        "--save-interval",
        "10",
        "--eval-interval",
        "10",
        "--weight-decay",
        "0.02",
    ]
    (done,) = pool.run(1, train, sample, *words)
    assert done[0] == 0, done
    assert main([str(reference), str(other)]) == 1
    assert "different: metrics.jsonl at iteration 3" in capsys.readouterr().out
    shutil.copy(reference / "metrics.jsonl", other)
    assert main([str(reference), str(other)]) == 1
    assert "iter_0000010/state.json: opt_param_scheduler is not the same" in capsys.readouterr().out
    for iteration in ("iter_0000010", "iter_0000020"):
        for name in ("state.json", "common.pt"):
            shutil.copy(reference / iteration / name, other / iteration)
    assert main([str(reference), str(other)]) == 1
    assert (
        "different: iter_0000010: decoder.final_layernorm.weight differs first at element"
        in capsys.readouterr().out
    )
    lines = (reference / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert main([str(reference), str(other)]) == 1
    assert "records" in capsys.readouterr().out


def test_bad_input_is_reported_and_not_taken_for_a_difference(
    sample: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, part in (
        ([str(reference), str(tmp_path)], "is not a run directory"),
        ([str(reference), str(reference), "--iteration", "7"], "no checkpoint of iteration 7"),
    ):
        assert main(words) == 2
        assert part in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(reference / "metrics.jsonl", empty)
    assert main([str(reference), str(empty)]) == 2
    assert "no checkpoint of one iteration" in capsys.readouterr().err
    (empty / "metrics.jsonl").write_text("not json\n")
    assert main([str(empty), str(empty)]) == 2
    torn = tmp_path / "torn"
    shutil.copytree(reference, torn)
    (torn / "iter_0000010" / ".metadata").write_bytes(json.dumps({}).encode())
    assert main([str(reference), str(torn)]) == 2
    assert "a checkpoint cannot be read" in capsys.readouterr().err


def test_it_runs_as_a_script_and_shows_examples() -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "examples:" in done.stdout and "exit codes:" in done.stdout
    done = subprocess.run([sys.executable, TOOL, "one"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
