"""A domain that runs out in a real run, in each of the four ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.curriculum import load_curriculum
from megatron_chatflow.data import open_domains
from tests.audit import Story, make_corpus, read_notes, source_lines
from tests.pool import Pool, command

HALVES = [{"name": "halves", "at": 0, "weights": {"en": 0.5, "zh": 0.5}}]
ENGLISH = [{"name": "english", "at": 0, "weights": {"en": 1}}]
AMEND = "--amend-curriculum"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough English, and a few Chinese documents that a run of 320 samples uses up."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, documents in (("en", 200), ("zh", 16)):
        make_corpus(name, folder, source_lines(name)[:documents])
    return folder


@pytest.fixture
def story(pool: Pool, corpora: Path, tmp_path: Path) -> Story:
    return Story(pool, corpora, tmp_path / "story")


def write(story: Story, on_exhausted: str, stages: list[dict[str, Any]] = HALVES, **zh: Any) -> int:
    """The curriculum file; returns the samples in one epoch of zh."""
    story.write(stages, {"en": {}, "zh": zh}, on_exhausted=on_exhausted)
    windows = open_domains(
        load_curriculum(story.folder / "curriculum.yaml"),
        seq_length=64,
        seed=1234,
        split="900,100,0",
    )["zh"].num_samples
    assert (
        50 < windows < 70
    )  # half of the run's samples are zh: it runs out between sample 100 and 140
    return windows


def plan(story: Story, *words: str) -> tuple[int, str, str]:
    return command("plan", "--config", str(story.folder / "run.yaml"), *words)


def complete_run(out: str, name: str) -> list[str]:
    """The columns of a domain in the table of the complete run: share, samples, tokens, epochs, max
    epochs, sample at which it runs out.
    """
    return re.search(rf"^  {name} +(.+)$", out[out.index("the complete run") :], re.MULTILINE)[
        1
    ].split()


@pytest.mark.slow
def test_repeat_reads_a_domain_again_in_another_order(story: Story) -> None:
    windows = write(story, "repeat")
    code, out, _ = plan(story)
    assert code == 0 and complete_run(out, "zh") == [
        "50.0%",
        "160",
        "10.2K",
        f"{160 / windows:.2f}",
        "-",
        "-",
    ]
    story.go("--exit-interval", "9")
    story.go()
    served = story.audit(320, (0, HALVES))
    texts = [f for f, name in zip(served.fingerprints, served.names, strict=True) if name == "zh"]
    assert len(texts) > 2 * windows
    first, second = texts[:windows], texts[windows : 2 * windows]
    assert set(first) == set(second) and first != second


@pytest.mark.parametrize(
    ("on_exhausted", "keys", "reason"),
    [
        ("repeat", {"max_epochs": 2}, "max_epochs is 2; raise max_epochs"),
        ("error", {}, "on_exhausted is error, so it may be read once; give it a max_epochs"),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_run(
    story: Story, on_exhausted: str, keys: dict[str, int], reason: str
) -> None:
    windows = write(story, on_exhausted, **keys)
    sentence = (
        f"domains.zh: the run reads it {160 / windows:.4g} times (160 samples of {windows} an "
        f"epoch), and {reason}"
    )
    assert sentence in story.refused() and not story.run.exists()
    code, out, err = plan(story)
    assert code == 2 and sentence in err
    runs_out = int(complete_run(out, "zh")[-1])
    assert (
        f"warning: zh runs out at sample {runs_out}: the run would be refused "
        f"(on_exhausted: {on_exhausted})"
    ) in out
    assert abs(runs_out - 2 * windows * keys.get("max_epochs", 1)) <= 2


def test_stop_ends_the_run_with_the_last_complete_iteration_that_can_be_served(
    story: Story,
) -> None:
    windows = write(story, "stop")
    code, out, _ = plan(story)
    end = int(complete_run(out, "zh")[-1])
    assert (
        code == 0
        and f"warning: the run ends at sample {end} of 320: zh runs out there (on_exhausted: stop)"
        in out
    )
    out = story.go("--save-interval", "3")
    done = end - end % 16
    assert f"the run ends at sample {end} of 320: zh runs out there" in out
    assert (
        f"the run ends {320 - done} samples before its planned 320: zh runs out at sample "
        f"{end} (on_exhausted: stop)"
    ) in out
    served = story.audit(done, (0, HALVES))
    assert windows - 16 < served.names.count("zh") <= windows

    before = (story.run / "metrics.jsonl").read_bytes()
    out = story.go()
    assert (
        f"nothing to do: {done} of {end} samples are trained on, and an iteration is 16; zh "
        f"runs out at sample {end}"
    ) in out
    assert len(story.launches) == 1 and (story.run / "metrics.jsonl").read_bytes() == before

    write(story, "stop", max_epochs=2)
    out = story.go()
    longer = int(re.search(r"zh runs out at sample (\d+)", out)[1])
    assert abs(longer - 4 * windows) <= 2
    story.audit(longer - longer % 16, (0, HALVES))

    write(story, "stop", ENGLISH)
    story.go(AMEND)
    story.audit(320, (0, HALVES), (longer - longer % 16, ENGLISH))


def test_redistribute_gives_the_share_to_the_others(story: Story) -> None:
    windows = write(story, "redistribute")
    code, out, _ = plan(story)
    end = int(complete_run(out, "zh")[-1])
    assert (
        code == 0
        and f"warning: zh runs out at sample {end}: from there its share goes to the others" in out
    )
    assert complete_run(out, "zh")[1] == str(windows) and complete_run(out, "en")[1] == str(
        320 - windows
    )
    for stop in (end // 16, end // 16 + 1):
        story.go("--exit-interval", str(stop))
    story.go()
    served = story.audit(320, (0, HALVES), (end, ENGLISH))
    assert served.names.count("zh") == windows and set(served.names[end:]) == {"en"}


@pytest.mark.slow
def test_an_amendment_counts_what_was_read_before_against_what_a_domain_can_give(
    story: Story,
) -> None:
    windows = write(story, "redistribute")
    story.go("--exit-interval", "4")
    mostly = [{"name": "mostly zh", "at": 0, "weights": {"en": 0.1, "zh": 0.9}}]
    write(story, "redistribute", mostly)
    story.go(AMEND, "--exit-interval", "10")
    served = read_notes(story.launches)
    end = max(n for n, name in enumerate(served.names) if name == "zh") + 1
    assert served.names.count("zh") == windows and end < 110
    story.audit(160, (0, HALVES), (64, mostly), (end, ENGLISH))

    write(story, "redistribute", mostly, max_epochs=2)  # it may be read once more, from here on
    first = re.search(r"first at sample (\d+) of the 160 already trained on", story.refused())
    assert end <= int(first[1]) < end + 5
    story.go(AMEND)
    served = read_notes(story.launches)
    again = max(n for n, name in enumerate(served.names) if name == "zh") + 1
    assert served.names.count("zh") == 2 * windows and again < 240
    story.audit(320, (0, HALVES), (64, mostly), (end, ENGLISH), (160, mostly), (again, ENGLISH))


@pytest.mark.slow
def test_a_domain_that_was_read_more_than_a_new_cap_allows_gives_nothing_more(story: Story) -> None:
    windows = write(story, "repeat")
    story.go("--exit-interval", "10")
    write(story, "redistribute")
    assert AMEND in story.refused()
    story.go(AMEND)
    served = story.audit(320, (0, HALVES), (160, ENGLISH))
    assert served.names.count("zh") == 80 > windows


def test_plan_shows_what_a_resumed_run_would_read(story: Story) -> None:
    write(story, "repeat")
    story.go("--exit-interval", "10")
    write(story, "repeat", ENGLISH)
    words = ["--load", str(story.run)]
    code, _, err = plan(story, *words)
    assert code == 2 and "restore the file, or add --amend-curriculum" in err
    story.write(ENGLISH, {"en": {}})
    code, _, err = plan(story, *words, AMEND)
    assert code == 2 and "domain zh: it is in the plan but not in the curriculum" in err
    write(story, "repeat", ENGLISH)
    code, out, _ = plan(story, *words, AMEND)
    assert code == 0 and complete_run(out, "en")[1] == "240" and complete_run(out, "zh")[1] == "80"
    assert "stage halves: samples 0 to 159" in out and "stage english: samples 160 to 319" in out
