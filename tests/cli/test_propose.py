"""`chatflow propose`: laws, predictions, proposals within caps and floors, and the written file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_chatflow.curriculum import load_curriculum
from megatron_chatflow.planner.laws.run_table import write_table
from tests.planner.laws import mixtures
from tests.pool import Pool, command
from tests.sample import metrics, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with table.csv and the laws that were fitted to it, laws.json."""
    folder = tmp_path_factory.mktemp("propose")
    write_table(folder / "table.csv", mixtures.runs())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_chatflow.planner.laws.mixture_law.DRAWS", 30)
        code, out, err = command(
            "propose", folder / "table.csv", "--save-laws", folder / "laws.json"
        )
    assert code == 0, err
    assert "fitting the law of en (1 of 2)" in err and "laws written to" in out
    return folder


def shares_of(out: str) -> dict[str, float]:
    rows = re.findall(r"^  (\S+) +(\d\.\d{4}) ", out.split("  loss ")[0], re.MULTILINE)
    return {name: float(share) for name, share in rows}


def test_a_proposal_moves_toward_the_weights_and_respects_its_floor(folder: Path) -> None:
    code, out, err = command("propose", folder / "laws.json", "--weights", "zh=1")
    assert code == 0, err
    assert shares_of(out)["zh"] > 0.8 and "inside of the measured range" in out
    code, out, err = command(
        *("propose", folder / "laws.json", "--weights", "zh=1", "--floors", "en=0.4")
    )
    assert code == 0, err
    assert shares_of(out) == {"en": 0.4, "zh": 0.6} and "at the floor: en" in out


def test_caps_by_epochs_limit_a_proposal(folder: Path) -> None:
    words = ("propose", folder / "laws.json", "--weights", "zh=1", "--tokens", "1e9")
    code, out, err = command(*words, "--available", "zh=5e7,en=1e10", "--max-epochs", "4")
    assert code == 0, err
    assert shares_of(out)["zh"] == pytest.approx(0.2) and "at the cap: zh" in out
    assert "the runs have 2,000,000 tokens and this one 1,000,000,000" in out
    code, out, err = command(*words, "--available", "zh=5e7,en=1e8")
    assert (code, out.count("proposed")) == (2, 0)
    assert "the caps allow shares of 0.6 in all (en 0.4, zh 0.2)" in err


def test_a_what_if_answers_each_language_with_its_interval(folder: Path) -> None:
    code, out, err = command(
        "propose", folder / "laws.json", "--what-if", "en=3,zh=7", "--tokens", "8e9"
    )
    assert code == 0, err
    assert "mixture: en 0.3, zh 0.7" in out
    level = 1.5 + 20 / 1e6**0.2 + 30 / 2e6**0.2
    for language, own in (("en", 0.3), ("zh", 0.7)):
        row = re.search(rf"^  {language} +(\S+) +(\S+) to (\S+)$", out, re.MULTILINE)
        assert row is not None
        loss, low, high = map(float, row.groups())
        assert low < loss < high
        assert loss == pytest.approx(level + 0.9 * 2.718281828 ** (-3 * own), rel=0.01)


def test_a_table_of_sizes_lengths_and_shares_answers_at_the_tokens_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_chatflow.planner.laws.dcpt.DRAWS", 20)
    records = mixtures.runs((10**6, 10**7, 10**8), (10**7, 10**8, 10**9), noise=0.0)
    write_table(tmp_path / "table.csv", records)
    words = ("propose", tmp_path / "table.csv", "--what-if", "en=0.3,zh=0.7", "--tokens", "8e9")
    code, out, err = command(*words, "--params", "1e8", "--weights", "zh=1")
    assert code == 0, err
    assert "dcpt laws" in out and "100,000,000 parameters and 8,000,000,000 tokens" in out
    row = re.search(r"^  zh +(\S+) ", out, re.MULTILINE)
    assert row is not None
    truth = 1.5 + 20 / 1e8**0.2 + 30 / 8e9**0.2 + 0.9 * 2.718281828**-2.1
    assert float(row.group(1)) == pytest.approx(truth, rel=0.05)


def test_stages_have_their_own_weights(folder: Path) -> None:
    code, out, err = command(
        *("propose", folder / "laws.json", "--stage", "english:0%:en=1"),
        *("--stage", "chinese:30%:zh=0.9,en=0.1"),
    )
    assert code == 0, err
    first, second = out.split("stage chinese, 70.0% of the run (weights: zh 0.9, en 0.1)")
    assert shares_of(first)["en"] > 0.8 > shares_of(second)["en"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--floors", "hu=0.1"), "--floors: 'hu' is not a domain of the runs; they are en, zh"),
        (("--floors", "en:0.1"), "--floors: 'en:0.1' is not NAME=NUMBER"),
        (("--floors", "en=0.7,zh=0.6"), "the floors en=0.7 + zh=0.6 add up to 1.3, above 1"),
        (("--weights", "hu=1"), "no law of 'hu'; the languages are en, zh"),
        (("--what-if", "en=0"), "--what-if: no share is positive"),
        (("--output", "x.yaml"), "--output needs the domains; give --curriculum FILE"),
        (("--stage", "a:10%:en=1"), "the first stage begins at 0%"),
        (("--stage", "a:en=1"), "write NAME:AT:LANGUAGE=W"),
        (("--what-if", "en=1", "--stage", "a:0%:en=1"), "--what-if only predicts"),
        (("--mixture", "x.csv"), "--mixture and --losses are a pair"),
    ],
)
def test_what_is_wrong_is_one_message(folder: Path, words: tuple[str, ...], message: str) -> None:
    code, out, err = command("propose", folder / "laws.json", *words)
    assert code == 2 and message in err and "Traceback" not in err


def test_runs_that_were_not_annealed_are_refused(tmp_path: Path) -> None:
    records = [replace(record, annealed=False) for record in mixtures.runs(shares=(0.1, 0.5))]
    write_table(tmp_path / "table.csv", records)
    code, _, err = command("propose", tmp_path / "table.csv")
    assert code == 2 and "had not finished decaying" in err and "--allow-unannealed" in err
    code, _, err = command("propose", tmp_path / "table.csv", "--allow-unannealed")
    assert code == 2 and "2 runs with 2 mixtures cannot determine the 3 parameters" in err


def test_the_laws_of_fit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_chatflow.planner.laws.mixture_law.DRAWS", 10)
    table, law = tmp_path / "table.csv", tmp_path / "law.json"
    write_table(table, mixtures.runs(shares=(0.0, 0.2, 0.5, 0.8, 1.0), noise=0.0))
    code, out, err = command("fit", table, "--form", "mixture", "--output", law)
    assert code == 0, err
    assert "mixture form, 5 runs: L = c + exp(sum_j T_j x_j)" in out and "T zh" in out
    code, out, err = command("propose", law, "--weights", "zh=1")
    assert code == 0, err
    assert shares_of(out)["zh"] > 0.8
    code, _, err = command("fit", table, "--form", "mixture", "--huber", "1e-3")
    assert code == 2 and "--form mixture: --huber" in err
    code, _, err = command("fit", table, "--form", "dcpt")
    assert code == 2 and "runs of 1 lengths cannot determine B and beta" in err


def test_a_damaged_file_of_laws_is_refused(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "laws.json"
    for text in ("{}", "[1", (folder / "laws.json").read_text()[:-30] + "}"):
        path.write_text(text)
        code, _, err = command("propose", path)
        assert code == 2 and f"{path}: " in err


def test_the_written_file_is_a_curriculum_within_the_caps_of_the_run(
    folder: Path, sample: Path, tmp_path: Path
) -> None:
    output = tmp_path / "proposed.yaml"
    words = ("propose", folder / "laws.json", "--config", sample / "run.yaml", "--output", output)
    code, out, err = command(*words, "--weights", "zh=1", "--max-epochs", "0.02")
    assert code == 2 and "the caps allow shares of" in err and not output.exists()
    words = (*words, "--floors", "en=0.1", "--weights", "zh=1")
    code, out, err = command(*words, "--max-epochs", "0.05")
    assert code == 0, err
    assert f"{output}: 1 stage of 2 domains written" in out and "at the cap: zh" in out
    text = output.read_text(encoding="utf-8")
    assert "# Proposed by chatflow propose from" in text and "at its cap: 0.05 epochs of" in text
    assert "Not in the table of runs, so without a share: en-zh, instruct." in text
    proposed, base = load_curriculum(output), load_curriculum(sample / "curriculum.yaml")
    assert {n: d.path for n, d in proposed.domains.items()} == {
        n: d.path for n, d in base.domains.items()
    }
    assert proposed.domains["zh"].max_epochs == 0.05
    weights = proposed.stages[0].weights
    assert sum(weights.values()) == pytest.approx(1, abs=1e-5) and weights["en"] >= 0.1
    code, out, err = command("plan", "--config", sample / "run.yaml", "--curriculum", output)
    assert code == 0, err


@pytest.mark.slow
def test_train_runs_the_written_file_unchanged(
    folder: Path, sample: Path, tmp_path: Path, pool: Pool
) -> None:
    output, run = tmp_path / "proposed.yaml", tmp_path / "run"
    code, _, err = command(
        *("propose", folder / "laws.json", "--config", sample / "run.yaml", "--output", output),
        *("--weights", "zh=0.7,en=0.3", "--stage", "first:0%:en=1", "--stage", "then:40%:zh=1"),
    )
    assert code == 0, err
    before = output.read_bytes()
    (done,) = pool.run(1, train, sample, "--curriculum", str(output), "--save", str(run))
    assert done[0] == 0, done
    assert output.read_bytes() == before and len(metrics(run)) == 20
    plan = yaml.safe_load((run / "plan.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in plan["segments"][0]["stages"]] == ["first", "then"]
