"""The mixture law: recovered from closed forms, chosen by error, refused where undetermined."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.interpolation import compare, interpolate
from megatron_chatflow.planner.laws.mixture_law import SATURATION, fit_mixture_law
from megatron_chatflow.planner.laws.mixture_table import (
    MixtureTable,
    check_mixtures,
    in_one_unit,
    largest_group,
    mixture_table,
    read_published,
)
from megatron_chatflow.planner.laws.run_table import RunRecord

DATA = os.environ.get("CHATFLOW_LAWS_DATA", "")
NAMES = ("en", "zh", "code", "math")
RATES = np.array([0.6, -1.1, 0.1, 0.4])
FLOOR = 1.7


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_chatflow.planner.laws.mixture_law.DRAWS", 60)


def mixtures(count: int, size: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(size), count)


def exponential(shares: np.ndarray) -> np.ndarray:
    return FLOOR + np.exp(shares @ RATES)


def saturating(shares: np.ndarray) -> np.ndarray:
    bends = np.log(1 + shares / SATURATION) / np.log(1 + 1 / SATURATION)
    return FLOOR + np.exp(shares @ RATES - bends @ [0.0, 0.9, 0.2, 0.0])


def table(shares: np.ndarray) -> MixtureTable:
    names = tuple(f"run{i}" for i in range(len(shares)))
    return MixtureTable("t.csv", names, NAMES, shares, {"zh": np.ones(len(shares))})


def test_constants_of_noiseless_losses_are_recovered_to_six_digits() -> None:
    shares = mixtures(30)
    law = fit_mixture_law("zh", NAMES, shares, exponential(shares))
    assert law.form == "exponential"
    assert law.floor == pytest.approx(FLOOR, rel=1e-6)
    np.testing.assert_allclose(law.rates, RATES, rtol=1e-6)
    assert law.error < 1e-6


def test_the_saturating_form_is_chosen_where_the_first_tokens_count_most() -> None:
    shares, new = mixtures(60), mixtures(40, seed=1)
    noise = np.exp(0.003 * np.random.default_rng(2).normal(size=60))
    law = fit_mixture_law("zh", NAMES, shares, saturating(shares) * noise)
    assert law.form == "saturating" and (law.saturation >= 0).all()
    assert np.abs(law.predict(new) / saturating(new) - 1).max() < 0.02


def test_intervals_of_a_new_run_cover_it() -> None:
    noise = np.exp(0.003 * np.random.default_rng(3).normal(size=40))
    shares, new = mixtures(40), mixtures(100, seed=4)
    law = fit_mixture_law("zh", NAMES, shares, exponential(shares) * noise)
    drawn = exponential(new) * np.exp(0.003 * np.random.default_rng(5).normal(size=100))
    intervals = np.array([law.interval(x) for x in new])
    inside = (intervals[:, 0] <= drawn) & (drawn <= intervals[:, 1])
    assert 85 <= inside.sum() <= 100


def test_the_gradient_is_that_of_the_loss_where_text_is_repeated() -> None:
    from megatron_chatflow.planner.proposal import effective_shares

    shares = mixtures(60)
    law = fit_mixture_law("zh", NAMES, shares, saturating(shares))
    x, new = np.array([0.1, 0.5, 0.3, 0.1]), np.array([1.0, 0.1, 0.2, 0.05])
    gradient = law.value_and_gradient(x, *effective_shares(x, new))[1]
    for j in range(4):
        up, down = x.copy(), x.copy()
        up[j], down[j] = x[j] + 1e-6, x[j] - 1e-6
        values = [law.value_and_gradient(y, *effective_shares(y, new))[0] for y in (up, down)]
        assert gradient[j] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_unrepeated_text_has_the_loss_of_the_law() -> None:
    shares = mixtures(60)
    law = fit_mixture_law("zh", NAMES, shares, saturating(shares))
    x = shares[3]
    assert law.value_and_gradient(x, x, np.ones(4))[0] == pytest.approx(float(law.predict(x)))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (np.tile(mixtures(1), (9, 1)), "all 9 runs have one mixture"),
        (mixtures(5), "5 runs with 5 mixtures cannot determine the 5 parameters of 4 domains"),
        (np.repeat(mixtures(4), 3, axis=0), "12 runs with 4 mixtures cannot determine"),
        (
            np.hstack([mixtures(9, 3) * 0.9, np.full((9, 1), 0.1)]),
            "the share of math (0.1) is the same in every run",
        ),
        (
            np.hstack([mixtures(9, 3)[:, :2], np.repeat(mixtures(9, 3)[:, 2:] / 2, 2, axis=1)]),
            "the shares of code, math vary only together",
        ),
    ],
)
def test_mixtures_that_cannot_determine_the_law_are_refused(
    shares: np.ndarray, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_mixtures(table(shares), "zh")
    assert message in str(error.value) and "; " in str(error.value)


def test_a_law_of_an_unmeasured_language_is_refused() -> None:
    with pytest.raises(ConfigError, match="no run measured 'hu'; the languages are zh"):
        check_mixtures(table(mixtures(9)), "hu")


def test_interpolation_is_exact_on_planes_and_refuses_to_extrapolate() -> None:
    shares = mixtures(30)
    plane = shares @ np.array([1.0, 2.0, 3.0, 4.0])
    inside = shares[:5].mean(axis=0)
    assert interpolate(shares, plane, inside) == pytest.approx(inside @ [1.0, 2.0, 3.0, 4.0])
    assert interpolate(shares, plane, np.array([1.0, 0.0, 0.0, 0.0])) is None


def test_straight_interpolation_is_as_good_where_the_losses_are_straight() -> None:
    points = np.linspace(0, 1, 9)
    shares = np.stack([points, 1 - points], axis=1)
    noise = 0.01 * np.random.default_rng(6).normal(size=9)
    for losses, verdict in ((3 - points + noise * 0.1, True), (2 + np.exp(-6 * points), False)):
        law = fit_mixture_law("zh", ("en", "zh"), shares, losses)
        found = compare(law, shares, losses)
        assert (found.runs, found.straight_is_as_good) == (7, verdict)


def record(params: int, share: float, language: str = "zh", **more: float | None) -> RunRecord:
    values = {"loss": 3.0, "bits_per_byte": None, **more}
    mixture = {"en": 1 - share, "zh": share}
    return RunRecord(f"r{share}", params, 10, language=language, mixture=mixture, **values)


def test_the_group_with_most_mixtures_is_taken_and_the_others_are_reported() -> None:
    records = [record(10, s) for s in (0.1, 0.2, 0.3)] + [record(99, s) for s in (0.1, 0.2)]
    group, note = largest_group(records)
    assert {r.params for r in group} == {10} and "3 results" in note and "2 are not" in note
    assert largest_group(group) == (group, "")


def test_bits_per_byte_are_used_where_all_runs_have_them() -> None:
    records, unit = in_one_unit([record(10, 0.1, bits_per_byte=1.0), record(10, 0.2)])
    assert (unit, records[0].loss) == ("nats per token", 3.0)
    records, unit = in_one_unit([record(10, 0.1, bits_per_byte=1.0)])
    assert (unit, records[0].loss) == ("bits per byte", 1.0)
    with pytest.raises(ConfigError, match="has bits per byte only"):
        in_one_unit([record(10, 0.1, loss=None, bits_per_byte=1.0), record(10, 0.2)])


def test_languages_of_one_run_are_joined_and_wrong_sums_are_refused() -> None:
    records = [record(10, s, language) for s in (0.1, 0.2) for language in ("en", "zh")]
    found = mixture_table("t.csv", records, "nats per token")
    assert found.domains == ("en", "zh") and len(found.names) == 2
    assert set(found.losses) == {"en", "zh"}
    wrong = RunRecord("r", 1, 1, 3.0, mixture={"en": 0.5, "zh": 0.2})
    with pytest.raises(ConfigError, match="run r add up to 0.7"):
        mixture_table("t.csv", [wrong], "nats per token")


def test_published_tables_are_joined_by_run_and_keep_plain_names(tmp_path: Path) -> None:
    mixture, losses = tmp_path / "mixture.csv", tmp_path / "losses.csv"
    mixture.write_text(
        "index,train_the_pile_arxiv,train_the_pile_pile_cc\n1,0.25,0.75\n2,0.5,0.501\n3,1,0\n"
    )
    losses.write_text(
        "index,metric/the_pile_pile_cc_val_loss,metric/the_pile_github_val_loss\n"
        "2,5.5,\n1,5.25,6.0\n"
    )
    found = read_published(mixture, losses)
    assert found.names == ("1", "2") and found.domains == ("arxiv", "pile_cc")
    np.testing.assert_allclose(found.shares.sum(axis=1), 1)
    assert found.losses["pile_cc"].tolist() == [5.25, 5.5]
    assert len(found.of("github")[1]) == 1
    losses.write_text("index,a\n7,1\n")
    with pytest.raises(ConfigError, match="no run is in both"):
        read_published(mixture, losses)


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="CHATFLOW_LAWS_DATA does not name the published tables")
@pytest.mark.parametrize("language", ["pile_cc", "freelaw", "github"])
@pytest.mark.parametrize("draw", [None, 1, 2])
def test_a_law_of_128_published_runs_ranks_the_held_out_ones(
    language: str, draw: int | None
) -> None:
    from scipy.stats import spearmanr

    train, test = (
        read_published(
            f"{DATA}/regmix_{part}_mixture_1m.csv", f"{DATA}/regmix_{part}_pile_loss_1m.csv"
        )
        for part in ("train", "test")
    )
    chosen = np.arange(128)
    if draw is not None:
        chosen = np.random.default_rng(draw).choice(len(train.names), 128, replace=False)
    law = fit_mixture_law(
        language, train.domains, train.shares[chosen], train.losses[language][chosen]
    )
    correlation = spearmanr(law.predict(test.shares), test.losses[language])[0]
    assert correlation >= 0.95
