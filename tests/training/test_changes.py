"""Every change that people make to a run, each as a real run that is interrupted and resumed:
nothing is lost and nothing is read twice.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.audit import STAGES, TINY, Story, make_corpus, source_lines
from tests.pool import Pool, command
from tests.sample import metrics

TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
SCHEDULE = "--override-opt_param-scheduler"
AMEND = "--amend-curriculum"


def percent(stages: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """The same stages with knots in percent of a run of N samples."""
    return [stage | {"at": f"{stage['at'] * 100 / samples}%"} for stage in stages]


@pytest.fixture(scope="module")
def begun(pool: Pool, sample: Path) -> Story:
    """A run of 320 samples in iterations of 16, stopped at sample 128."""
    story = Story(pool, sample, sample / "changes")
    story.write(STAGES)
    story.go("--exit-interval", "8")
    return story


@pytest.fixture
def story(begun: Story, tmp_path: Path) -> Story:
    return begun.copy(tmp_path / "story")


def test_an_edited_curriculum_is_followed_from_the_next_sample_on(story: Story) -> None:
    edited = [
        {"name": "other", "at": 0, "weights": {"zh": 1}},
        {
            "name": "later",
            "at": 200,
            "weights": {"en": 0.2, "zh": 0.6, "en-zh": 0.2},
            "ramp": "linear",
        },
    ]
    story.write(edited)
    message = story.refused()
    assert (
        "first at sample 0 of the 128 already trained on; restore the file, or add "
        "--amend-curriculum"
    ) in message
    assert "amended at sample 128" in story.go(AMEND, "--exit-interval", "10")
    assert "amended" not in story.go(AMEND)  # file and ledger agree now, so the flag does nothing
    story.audit(320, (0, STAGES), (128, edited))
    assert [
        segment["start"]
        for segment in json.loads((story.run / "plan.json").read_text())["segments"]
    ] == [0, 128]


def test_an_edit_of_the_future_alone_needs_no_flag(story: Story) -> None:
    edited = [*STAGES, {"name": "english again", "at": 280, "weights": {"en": 1}, "ramp": "step"}]
    story.write(edited)
    story.go()
    served = story.audit(320, (0, STAGES), (128, edited))
    assert set(served.names[280:]) == {"en"}


def test_a_domain_that_is_added_begins_with_its_first_sample(story: Story) -> None:
    edited = [
        {
            "name": "with instructions",
            "at": 0,
            "weights": {"en": 0.2, "zh": 0.3, "en-zh": 0.1, "instruct": 0.4},
        }
    ]
    story.write(edited, {"instruct": {}, "en": {}, "zh": {}, "en-zh": {}})
    assert AMEND in story.refused()
    story.go(AMEND)
    served = story.audit(320, (0, STAGES), (128, edited))
    assert "instruct" not in served.names[:128] and served.names[128:].count("instruct") > 70


def test_a_domain_that_is_dropped_gives_nothing_more_and_stays_in_the_file(story: Story) -> None:
    edited = [{"name": "without parallel text", "at": 0, "weights": {"en": 0.4, "zh": 0.6}}]
    story.write(edited, {"en": {}, "zh": {}})
    assert (
        "domain en-zh: it is in the plan but not in the curriculum: keep a domain that is "
        "no longer wanted"
    ) in story.refused(AMEND)
    story.write(edited)
    story.go(AMEND)
    served = story.audit(320, (0, STAGES), (128, edited))
    assert "en-zh" in served.names[:128] and "en-zh" not in served.names[128:]


def test_another_global_batch_and_micro_batch_size_continue_at_the_same_sample(
    story: Story,
) -> None:
    story.go("--global-batch-size", "12", "--micro-batch-size", "3", "--exit-interval", "16")
    story.go("--global-batch-size", "32", "--micro-batch-size", "1")
    story.audit(320, (0, STAGES))
    records = metrics(story.run)
    assert [r["batch-size"] for r in records] == [16] * 8 + [12] * 8 + [32] * 3
    for record in records:
        code, out, err = command(
            "locate", "--checkpoint", str(story.run), "--iteration", str(record["iteration"])
        )
        start, stop = record["samples"]
        assert (
            code == 0
            and (
                f"iteration {record['iteration']}: samples {start} to {stop - 1}, stage "
                f"{record['stage']}"
            )
            in out
        ), err
        found = re.findall(r"^sample \d+: domain (\S+),", out, re.MULTILINE)
        assert {name: found.count(name) for name in found} == {
            n: d["samples"] for n, d in record["domains"].items() if d["samples"]
        }
    code, _, err = command("locate", "--checkpoint", str(story.run), "--iteration", "20")
    assert code == 2 and "from 1 to 19" in err


def test_a_length_in_iterations_stays_one_when_the_batch_size_changes(
    pool: Pool, begun: Story, tmp_path: Path
) -> None:
    story = begun.copy(tmp_path / "story")
    training = {"micro_batch_size": 2, "global_batch_size": 16, "train_iters": 20}
    (story.folder / "run.yaml").write_text(yaml.safe_dump(TINY | {"training": training}))
    out = story.go("--global-batch-size", "8", SCHEDULE)
    assert "iteration       20/      20" in out
    story.audit(224, (0, STAGES))
    assert (
        "train_iters is 19 and the checkpoint is at iteration 20, sample 224; give a longer run"
        in story.refused("--train-iters", "19")
    )


@pytest.mark.slow
def test_one_run_goes_through_every_layout(story: Story) -> None:
    for world, flags, stop in ((2, [], "10"), (2, TP, "12"), (2, PP, "14"), (4, TP, "16")):
        story.go(*flags, "--exit-interval", stop, world=world)
    story.go()
    story.audit(320, (0, STAGES))


def test_a_longer_run_with_knots_in_samples_continues(story: Story) -> None:
    assert "train_samples 480 (before: 320)" in story.go("--train-samples", "480")
    story.audit(480, (0, STAGES))


@pytest.mark.slow
def test_a_run_that_was_finished_is_lengthened(story: Story) -> None:
    story.go()
    again = story.launch()[0]
    assert again[0] == 0 and "nothing to do: 320 of 320 samples are trained on" in again[1]
    story.go("--train-samples", "400", SCHEDULE)
    story.audit(400, (0, STAGES))


@pytest.mark.slow
def test_a_longer_run_with_knots_in_percent_has_another_past_and_is_amended(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    story = Story(pool, sample, tmp_path / "story")
    story.write(percent(STAGES, 320))
    story.go("--exit-interval", "8")
    longer = ["--train-samples", "640", SCHEDULE]
    message = story.refused(*longer)
    assert (
        "(percentages were of 320 samples and are of 640 now); restore the file, or add "
        "--amend-curriculum"
    ) in message
    story.go(*longer, AMEND)
    doubled = [stage | {"at": stage["at"] * 2} for stage in STAGES]
    story.audit(640, (0, STAGES), (128, doubled))


@pytest.mark.slow
def test_knots_in_iterations_move_with_the_batch_size_and_are_amended(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    story = Story(pool, sample, tmp_path / "story")
    story.write([stage | {"at": stage["at"] // 16} for stage in STAGES], clock="iterations")
    story.go("--exit-interval", "8")
    assert "(iterations were of 16 samples and are of 8 now)" in story.refused(
        "--global-batch-size", "8"
    )
    story.go("--global-batch-size", "8", AMEND)
    story.audit(320, (0, STAGES), (128, [stage | {"at": stage["at"] // 2} for stage in STAGES]))


@pytest.mark.slow
def test_many_changes_in_one_run_with_a_kill_between(story: Story) -> None:
    """Amended, a domain added, other batches, other layouts, lengthened twice, a domain dropped;
    once the run falls back to an earlier checkpoint.
    """
    names = {"en": {}, "zh": {}, "en-zh": {}, "instruct": {}}
    first = [{"name": "a", "at": 0, "weights": {"zh": 0.5, "en-zh": 0.2, "instruct": 0.3}}]
    story.write(first, names)
    flags = [
        "--train-samples",
        "400",
        "--global-batch-size",
        "12",
        "--micro-batch-size",
        "3",
        SCHEDULE,
        "--save-interval",
        "2",
    ]
    story.go(*flags, *TP, AMEND, "--exit-interval", "14", world=2)
    (story.run / "latest_checkpointed_iteration.txt").write_text(
        "12\n"
    )  # killed before iteration 14 was saved
    second = [
        {"name": "b", "at": 0, "weights": {"en": 0.6, "instruct": 0.4}},
        {"name": "c", "at": 300, "weights": {"en": 0.1, "zh": 0.9}},
    ]
    story.write(second, names)
    assert "first at sample 128 of the 176 already trained on" in story.refused(*flags)
    story.go(*flags, AMEND, "--exit-interval", "17", world=2)
    third = [
        *second,
        {"name": "d", "at": 440, "weights": {"zh": 0.5, "en-zh": 0.5}, "ramp": "step"},
    ]
    story.write(third, names)
    longer = [
        "--train-samples",
        "528",
        "--global-batch-size",
        "24",
        "--micro-batch-size",
        "1",
        SCHEDULE,
    ]
    story.go(*longer, *PP, world=2)
    served = story.audit(524, (0, STAGES), (128, first), (176, second), (236, third))
    assert set(served.names[450:]) == {"zh", "en-zh"}
    ledger = json.loads((story.run / "plan.json").read_text())
    assert [segment["start"] for segment in ledger["segments"]] == [0, 128, 176]


def test_another_sequence_length_is_refused_with_the_reason(story: Story) -> None:
    message = story.refused("--seq-length", "32")
    assert (
        "seq_length is 32 here and 64 in the checkpoint, so its samples are other tokens; "
        "use --seq-length 64, or --finetune"
    ) in message


def test_another_split_is_refused(story: Story) -> None:
    assert (
        "split is 950,50,0 here and 900,100,0 in the checkpoint, which would read samples twice"
        in story.refused("--split", "950,50,0")
    )


@pytest.fixture
def own(pool: Pool, sample: Path, tmp_path: Path) -> Story:
    """A run over its own corpora that is stopped at sample 32, with files that may be
    changed.
    """
    story = Story(pool, tmp_path / "corpora", tmp_path / "story")
    story.write(STAGES)
    shutil.copytree(
        sample,
        story.corpora,
        ignore=lambda folder, names: [name for name in names if "_document" not in name],
    )
    story.go("--exit-interval", "2")
    return story


def test_a_corpus_that_was_made_again_from_other_text_is_refused(own: Story) -> None:
    size = (own.corpora / "en_text_document.bin").stat().st_size
    make_corpus(
        "en", own.corpora, sorted(source_lines("en"))
    )  # the same documents in another order
    assert (own.corpora / "en_text_document.bin").stat().st_size == size
    assert (
        "domain en: its corpus is not the one the checkpoint was trained on; restore the files"
        in own.refused()
    )


def test_another_tokenizer_is_refused_with_and_without_manifests(
    own: Story, tmp_path: Path
) -> None:
    bytewise = ["--tokenizer-type", "ByteLevelTokenizer", "--vocab-size", "4096"]
    settings = {key: value for key, value in TINY.items() if key != "tokenizer"}
    (own.folder / "run.yaml").write_text(yaml.safe_dump(settings))
    message = own.refused(*bytewise)
    assert (
        "domain en: en_text_document was made with the tokenizer tokenizer.model "
        "(SentencePieceTokenizer), not with bytes of this run"
    ) in message
    for path in own.corpora.glob("*.json"):
        path.unlink()
    message = own.refused(*bytewise)
    assert (
        "the tokenizer is bytes here and another one, tokenizer.model, in the checkpoint" in message
        and "give it with --tokenizer-type" in message
    )
