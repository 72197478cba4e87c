"""`chatflow fit`: what it reads, refuses, answers and writes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.planner.laws import fit_input
from megatron_chatflow.planner.laws.forms import JOINT, PLAIN
from megatron_chatflow.planner.laws.run_table import RunRecord, write_table
from tests.planner.laws.tables import JOINT_LAW, PLAIN_LAW, grid, measured
from tests.pool import command

DATA = os.environ.get("CHATFLOW_LAWS_DATA")
PLAIN_RUNS = measured(PLAIN, PLAIN_LAW, grid(), noise=0.003)
BOTH = grid(kinds=("scratch", "continued"))


def table(folder: Path, runs: Sequence[RunRecord], name: str = "runs.csv") -> Path:
    path = folder / name
    write_table(path, runs)
    return path


def fit(*words: object) -> dict[str, Any]:
    """Run the command and return its JSON."""
    code, out, err = command("fit", *map(str, words), "--bootstrap", "10", "--json")
    assert code == 0, err
    return json.loads(out)


def refused(*words: object) -> str:
    code, out, err = command("fit", *map(str, words))
    assert (code, out) == (2, "")
    return err


def test_a_table_of_both_kinds_without_noise_gives_the_joint_law(tmp_path: Path) -> None:
    (law,) = fit(table(tmp_path, measured(JOINT, JOINT_LAW, BOTH)))["laws"]
    assert law["form"] == "joint"
    found = {name: value["estimate"] for name, value in law["constants"].items()}
    assert found == pytest.approx(JOINT_LAW, rel=1e-6)


def test_the_answers_to_a_budget_have_intervals_and_what_is_given_away(tmp_path: Path) -> None:
    runs = measured(JOINT, JOINT_LAW, BOTH, noise=0.003)
    words = ("--flops", "1e22", "--params", "1e9", "--predict", "7e9:2e12")
    (law,) = fit(table(tmp_path, runs), *words)["laws"]
    for kind in ("scratch", "continued"):
        (row,) = law["allocation"][kind]["budgets"]
        size, length = row["params"], row["tokens"]
        assert 6 * size["estimate"] * length["estimate"] == pytest.approx(1e22)
        assert size["low"] < size["estimate"] < size["high"]
        assert 0 <= row["given_away"] < 0.01
        assert law["given_sizes"][kind][0]["given_away"]["estimate"] > 0
    (saved,) = law["compute_saved"]
    assert 0 < saved["saved"]["low"] < saved["saved"]["estimate"] < 1
    assert len(law["transferred_tokens"]) == 2
    assert [p["kind"] for p in law["predictions"]] == ["scratch", "continued"]


def test_the_tables_name_the_constants_the_definition_of_n_and_the_files(tmp_path: Path) -> None:
    path = table(tmp_path, PLAIN_RUNS)
    law, plot = tmp_path / "law.json", tmp_path / "law.png"
    words = ("--output", str(law), "--plot", str(plot), "--bootstrap", "10")
    code, out, err = command("fit", str(path), *words)
    assert (code, err) == (0, "")
    for text in (
        "N is the number of non-embedding + output parameters",
        "do not say whether the learning rate had finished decaying",
        "condition number",
        "without the largest size (5B, 4 runs): error there",
        "Cook's distance",
        "given away",
        "runs that would determine the constants most",
        f"{law}: 1 laws as JSON",
        f"{plot}: plot of 20 runs",
    ):
        assert text in out
    assert json.loads(law.read_text())["laws"][0]["constants"].keys() == PLAIN_LAW.keys()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_runs_on_a_line_are_refused_with_the_runs_that_would_help(tmp_path: Path) -> None:
    line = [replace(run, tokens=20 * run.params) for run in grid(range(10**8, 10**9, 10**8), [1])]
    path = table(tmp_path, measured(PLAIN, PLAIN_LAW, line))
    err = refused(path)
    assert f"{path}: every run has D = 20 N, so alpha and beta cannot be distinguished" in err
    assert err.count("scratch N = ") == 3
    few = table(tmp_path, [replace(run, tokens=10**12) for run in line[:2]], "few.csv")
    assert "scratch N = 100M D = 1T" in refused(path, "--candidates", few, "--next", "1")


def test_the_candidates_are_those_of_the_list(tmp_path: Path) -> None:
    names = [replace(run, name=f"c{i}") for i, run in enumerate(grid([1e7, 3e10], [1e8, 1e12]))]
    path = table(tmp_path, names, "candidates.csv")
    (law,) = fit(table(tmp_path, PLAIN_RUNS), "--candidates", path, "--next", 2)["laws"]
    assert len(law["proposals"]) == 2
    assert {entry["name"] for entry in law["proposals"]} <= {run.name for run in names}


def test_the_frozen_form_warns_that_its_intervals_are_too_narrow(tmp_path: Path) -> None:
    path = table(tmp_path, measured(JOINT, JOINT_LAW, BOTH, noise=0.003))
    (law,) = fit(path, "--form", "frozen")["laws"]
    assert any("too narrow" in warning for warning in law["warnings"])
    assert law["constants"]["alpha"]["fixed"] and "fixed" not in law["constants"]["gamma"]
    assert "two kinds, continued and scratch" in refused(path, "--form", "plain")
    (continued,) = fit(path, "--where", "kind=continued")["laws"]
    assert continued["form"] in ("plain", "extended")


def test_printed_constants_are_shown_and_never_planned_with() -> None:
    code, out, err = command("fit", "--as-printed")
    assert (code, err) == (0, "")
    assert "N = 0.324 C^0.429, D = 0.514 C^0.571" in out
    assert "N = 4.79 C^0.385, D = 0.0348 C^0.615" in out
    assert "3.3B tokens at 1.4B, 9.9B tokens at 5.5B, 12.0B tokens at 7B" in out
    assert "plans nothing" in refused("--as-printed", "--flops", "1e20")


def test_runs_that_were_not_annealed_are_refused_unless_allowed(tmp_path: Path) -> None:
    runs = [replace(run, annealed=i != 3) for i, run in enumerate(PLAIN_RUNS)]
    path = table(tmp_path, runs)
    assert "the learning rate of scratch 0x3 had not finished decaying" in refused(path)
    assert "1 runs had not finished decaying" in fit(path, "--allow-unannealed")["notes"][-1]
    (law,) = fit(path, "--leave-out", "scratch 0x3")["laws"]
    assert law["runs"] == 19
    assert "no run has this name" in refused(path, "--leave-out", "scratch 9x9")


def test_bits_per_byte_are_fitted_where_tokenizers_differ(tmp_path: Path) -> None:
    both = [
        replace(run, tokenizer="ab"[i % 2], bits_per_byte=run.loss, loss=5.0 + i % 2)
        for i, run in enumerate(PLAIN_RUNS)
    ]
    found = fit(table(tmp_path, both))
    assert "bits per byte, because the runs have 2 tokenizers" in " ".join(found["notes"])
    assert found["laws"][0]["metric"] == "bits_per_byte"
    assert found["laws"][0]["constants"]["beta"]["estimate"] == pytest.approx(0.366, abs=0.05)
    lacking = [replace(run, bits_per_byte=None) for run in both]
    assert "bits per byte are needed" in refused(table(tmp_path, lacking, "lacking.csv"))


def test_held_out_sets_are_never_mixed_and_languages_have_a_law_each(tmp_path: Path) -> None:
    two = [replace(r, language=x, loss=f * (r.loss or 0)) for r in PLAIN_RUNS for x, f in LANGUAGES]
    laws = fit(table(tmp_path, two))["laws"]
    assert [law["language"] for law in laws] == ["en", "zh"]
    ratio = laws[1]["constants"]["E"]["estimate"] / laws[0]["constants"]["E"]["estimate"]
    assert ratio == pytest.approx(1.5)
    mixed = [replace(run, language="") for run in two]
    assert "the table mixes held-out sets" in refused(table(tmp_path, mixed, "mixed.csv"))


LANGUAGES = (("en", 1.0), ("zh", 1.5))


def test_run_directories_and_tables_are_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = {run.name: run for run in PLAIN_RUNS}
    monkeypatch.setattr(fit_input, "records_of_run", lambda path: [records[path.name]])
    for run in PLAIN_RUNS[:10]:
        (tmp_path / run.name).mkdir()
    rest = table(tmp_path, PLAIN_RUNS[10:])
    (law,) = fit(*(tmp_path / run.name for run in PLAIN_RUNS[:10]), rest)["laws"]
    (same,) = fit(table(tmp_path, PLAIN_RUNS, "all.csv"))["laws"]
    assert law["constants"] == same["constants"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a TABLE"),
        (("none.csv",), r"none\.csv: No such file"),
        (("runs.csv", "--where", "language"), "'language' has no =; write --where language=zh"),
        (("runs.csv", "--predict", "7e9"), "has no colon; write N:D"),
        (("runs.csv", "--flops", "-1"), "is not a positive number"),
        (("runs.csv", "--form", "cubic"), "cubic"),
    ],
)
def test_words_that_cannot_be_used_are_refused(words: tuple[str, ...], message: str) -> None:
    import re

    assert re.search(message, refused(*words))


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="CHATFLOW_LAWS_DATA does not name the folder of tables")
def test_the_law_of_the_olmo_ladder_predicts_the_7b_and_13b_models() -> None:
    targets = {(6_887_575_552, 3_945_000_000_000): (2.48292, 0.005)}
    targets[13_202_396_160, 5_000_000_000_000] = (2.43758, 0.01)
    words = ["--predict", *(f"{n}:{d}" for n, d in targets)]
    path = Path(DATA or "") / "olmo_ladder.csv"
    (law,) = fit(path, "--where", "eval_set=c4_en", *words)["laws"]
    assert law["form"] == "extended"
    assert law["left_out"]["params"] == 3_169_537_280
    assert law["left_out"]["rms"] <= 0.007
    for found in law["predictions"]:
        loss, most = targets[found["params"], found["tokens"]]
        assert found["loss"]["estimate"] == pytest.approx(loss, rel=most)
