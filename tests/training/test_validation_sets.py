"""Held-out text: a domain's own validation corpus, and named validation sets, in the curriculum and
in real runs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_chatflow.curriculum import BlendPlan, Curriculum, load_curriculum, parse_curriculum
from megatron_chatflow.data import open_domains
from megatron_chatflow.errors import ChatflowError
from tests.audit import Story, make_corpus, source_lines
from tests.pool import Pool, command

STAGES = [{"name": "both", "at": 0, "weights": {"en": 0.5, "zh": 0.5}}]
EVERY = ["--eval-interval", "2", "--exit-interval", "2"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """en and zh for training, and in `held/` other documents of en, en-zh and instruct."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "held").mkdir()
    for name in ("en", "zh"):
        make_corpus(name, folder, source_lines(name)[:60])
    for name in ("en", "en-zh", "instruct"):
        make_corpus(name, folder / "held", source_lines(name)[60:90])
    return folder


def mapping(folder: Path, *, sets: dict[str, Any] | None = None, **en: Any) -> dict[str, Any]:
    domains = {
        "en": {"path": str(folder / "en_text_document"), **en},
        "zh": {"path": str(folder / "zh_text_document")},
    }
    return {"domains": domains, "stages": STAGES} | (
        {"validation": sets} if sets is not None else {}
    )


def read(folder: Path, **keys: Any) -> Curriculum:
    return parse_curriculum(mapping(folder, **keys), source="c.yaml", folder=folder)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "valid a number": (
        {"valid": 7},
        (
            "c.yaml: domains.en.valid: text is expected, found a number; write the prefix of "
            "its .bin and .idx"
        ),
    ),
    "valid empty": ({"valid": ""}, "c.yaml: domains.en.valid: no path is given; write the prefix"),
    "valid with an ending": (
        {"valid": "held/en.idx"},
        "c.yaml: domains.en.valid: 'held/en.idx' ends with .idx; write the prefix",
    ),
    "valid is the training text": (
        {"valid": "en_text_document"},
        "en_text_document is what domain 'en' is trained on; give text that is not trained on",
    ),
    "valid is another domain's": ({"valid": "zh_text_document"}, "domains.en.valid: "),
    "valid misspelt": (
        {"vaild": "x"},
        "c.yaml: domains.en.vaild: unknown key, did you mean 'valid'?",
    ),
    "a list of sets": (
        {"sets": [1]},
        "c.yaml: validation: a mapping is expected, found a list; write `name: {path: prefix}`",
    ),
    "a set as text": (
        {"sets": {"news": "x"}},
        "c.yaml: validation.news: a mapping is expected, found text; write `{path: prefix}`",
    ),
    "a set without a path": (
        {"sets": {"news": {}}},
        "c.yaml: validation.news.path: no path is given; write",
    ),
    "an unknown key of a set": (
        {"sets": {"news": {"path": "x", "max_epochs": 1}}},
        "c.yaml: validation.news.max_epochs: unknown key; the keys here are path, kind",
    ),
    "an unknown kind of a set": (
        {"sets": {"news": {"path": "x", "kind": "chat"}}},
        "c.yaml: validation.news.kind: 'chat' is unknown; choose one of text, instruct",
    ),
    "the name of a domain": (
        {"sets": {"zh": {"path": "x"}}},
        (
            "c.yaml: validation.zh: a domain has the same name, and both are reported under it; "
            "give it another name"
        ),
    ),
    "a name with a slash": (
        {"sets": {"a/b": {"path": "x"}}},
        "c.yaml: validation: 'a/b' is not a valid name for a validation set; use letters",
    ),
    "a name that is a number": (
        {"sets": {3: {"path": "x"}}},
        "c.yaml: validation: the name 3 is a number, not text; put it in quotes",
    ),
    "a set that is trained on": (
        {"sets": {"news": {"path": "zh_text_document"}}},
        "validation.news.path: ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_message_with_file_key_value_and_fix(corpora: Path, name: str) -> None:
    keys, sentence = WRONG[name]
    with pytest.raises(ChatflowError) as caught:
        read(corpora, **keys)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_paths_are_relative_to_the_file_and_survive_being_written(
    corpora: Path, tmp_path: Path
) -> None:
    c = read(
        corpora,
        valid="held/en_text_document",
        sets={"chat": {"path": "held/instruct_document", "kind": "instruct"}},
    )
    assert c.domains["en"].valid == str(corpora / "held" / "en_text_document")
    assert (c.validation["chat"].path, c.validation["chat"].kind) == (
        str(corpora / "held" / "instruct_document"),
        "instruct",
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(c.to_mapping()))
    again = load_curriculum(tmp_path / "c.yaml")
    assert (again.domains, again.validation) == (c.domains, c.validation)


def test_held_out_text_has_no_part_in_the_plan(corpora: Path) -> None:
    sizes = {"num_samples": 500, "global_batch_size": 4, "seq_length": 64}
    plain, more = (
        BlendPlan(read(corpora, **keys), **sizes)
        for keys in (
            {},
            {
                "valid": "held/en_text_document",
                "sets": {"chat": {"path": "held/instruct_document", "kind": "instruct"}},
            },
        )
    )
    assert (
        plain.fingerprint()
        == more.fingerprint()
        == BlendPlan.from_json(more.to_json()).fingerprint()
    )


def test_a_domain_with_a_validation_corpus_is_trained_on_completely_and_the_split_cuts_the_others(
    corpora: Path,
) -> None:
    c = read(corpora, valid="held/en_text_document")
    parts = {
        subset: {
            name: (Path(d.dataset.prefix).parent.name == "held", d.documents)
            for name, d in open_domains(c, **settings).items()
        }
        for subset in ("train", "valid", "test")
        for settings in [{"seq_length": 64, "seed": 1, "split": "80,10,10", "subset": subset}]
    }
    assert parts["train"] == {"en": (False, (0, 60)), "zh": (False, (0, 48))}
    assert parts["valid"] == {"en": (True, (0, 30)), "zh": (False, (48, 54))}
    assert parts["test"] == {"en": (False, (60, 60)), "zh": (False, (54, 60))}


@pytest.fixture(scope="module")
def story(pool: Pool, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Two iterations with every kind of held-out text; the set `again` is the very text that is
    held out of en.
    """
    story = Story(pool, corpora, tmp_path_factory.mktemp("validation") / "story")
    sets = {
        "parallel": {"path": str(corpora / "held" / "enzh_text_document")},
        "chat": {"path": str(corpora / "held" / "instruct_document"), "kind": "instruct"},
        "again": {"path": str(corpora / "held" / "en_text_document")},
    }
    story.write(
        STAGES,
        {"en": {"valid": str(corpora / "held" / "en_text_document")}, "zh": {}},
        validation=sets,
    )
    story.go(*EVERY)
    return story


def validations(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "validation" in record]


def test_every_held_out_text_is_reported_everywhere_under_its_name(story: Story) -> None:
    records = validations(story.run)
    names = {"en", "zh", "parallel", "chat", "again"}
    assert [r["iteration"] for r in records] == [0, 2] and all(
        r["validation"].keys() == names for r in records
    )
    log = EventAccumulator(str(story.run / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    for name in names:
        assert (
            f"   {name:<8} | loss {records[1]['validation'][name]['loss']:.4f} | perplexity"
            in story.output
        )
        for key in ("loss", "bits_per_byte"):
            assert log.Scalars(f"validation/{name}/{key}")[-1].value == pytest.approx(
                records[1]["validation"][name][key], rel=1e-6
            )


def test_a_set_with_the_text_of_a_domains_own_corpus_has_its_loss(story: Story) -> None:
    for record in validations(story.run):
        assert record["validation"]["again"] == record["validation"]["en"]
        assert record["validation"]["chat"]["loss"] != record["validation"]["parallel"]["loss"]


def test_megatrons_validation_loss_is_that_of_the_domains_alone(story: Story) -> None:
    for record in validations(story.run):
        en, zh = record["validation"]["en"], record["validation"]["zh"]
        mean = (en["loss"] * en["tokens"] + zh["loss"] * zh["tokens"]) / (
            en["tokens"] + zh["tokens"]
        )
        assert record["lm loss validation"] == pytest.approx(mean, rel=1e-12)


def test_evaluate_gives_the_same_losses_on_every_layout(story: Story, pool: Pool) -> None:
    ((code, out, err),) = pool.run(1, command, "evaluate", "--load", str(story.run), "--json")
    assert code == 0, err
    assert json.loads(out)["validation"] == validations(story.run)[-1]["validation"]
    (code, out, err), _ = pool.run(
        2,
        command,
        "evaluate",
        "--load",
        str(story.run),
        "--json",
        "--pipeline-model-parallel-size",
        "2",
    )
    assert code == 0, err
    for name, values in json.loads(out)["validation"].items():
        assert values["loss"] == pytest.approx(
            validations(story.run)[-1]["validation"][name]["loss"], rel=1e-5
        )


def test_a_resumed_run_may_get_other_sets_but_not_another_training_part(
    story: Story, corpora: Path, tmp_path: Path
) -> None:
    other = story.copy(tmp_path / "story")
    held = str(corpora / "held" / "en_text_document")
    other.write(STAGES, {"en": {"valid": held}, "zh": {"valid": held}})
    message = other.refused()
    assert (
        "domain zh: documents 0 to 60 would be trained on, and were 0 to 54 so far" in message
        and "restore domains.zh.valid " in message
    )
    other.write(STAGES, {"en": {}, "zh": {}}, validation={"news": {"path": held}})
    assert (
        "domain en: documents 0 to 54 would be trained on, and were 0 to 60 so far"
        in other.refused()
    )
    other.write(
        STAGES,
        {"en": {"valid": str(corpora / "held" / "enzh_text_document")}, "zh": {}},
        validation={"news": {"path": held}},
    )
    other.go("--eval-interval", "4", "--exit-interval", "4")
    assert validations(other.run)[-1]["validation"].keys() == {"en", "zh", "news"}
    other.audit(64, (0, STAGES))


def test_a_named_set_alone_is_enough_where_the_split_holds_nothing_out(
    story: Story, pool: Pool, corpora: Path, tmp_path: Path
) -> None:
    other = Story(pool, corpora, tmp_path / "story")
    other.write(STAGES, {"en": {}, "zh": {}})
    words = ["--split", "1,0,0", *EVERY]
    assert (
        "split 1,0,0 leaves no validation documents in any domain; give --split a larger "
        "second part, or name"
    ) in other.refused(*words)
    other.write(
        STAGES,
        {"en": {}, "zh": {}},
        validation={"news": {"path": str(corpora / "held" / "en_text_document")}},
    )
    out = other.go(*words)
    assert "nothing held out, so no validation loss: en, zh (split 1,0,0)" in out
    assert " validation loss at iteration 2 |\n   news | loss" in out
    (_, record) = validations(other.run)
    assert record["lm loss validation"] is None and math.isfinite(
        record["validation"]["news"]["loss"]
    )


def test_held_out_text_that_is_not_read_is_named(pool: Pool, corpora: Path, tmp_path: Path) -> None:
    other = Story(pool, corpora, tmp_path / "story")
    held = str(corpora / "held" / "en_text_document")
    other.write(STAGES, {"en": {"valid": held}, "zh": {}}, validation={"news": {"path": held}})
    assert "not read without --eval-interval: domains.en.valid, validation.news" in other.go(
        "--exit-interval", "1"
    )


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        ({"path": "nowhere"}, "validation news: corpus {}/nowhere: {}/nowhere.idx does not exist"),
        (
            {"path": "held/instruct_document"},
            (
                "validation news: corpus {}/held/instruct_document: kind is text, but it has "
                "sequence modes"
            ),
        ),
    ],
)
def test_a_set_that_cannot_be_read_is_refused_before_the_run(
    pool: Pool, corpora: Path, tmp_path: Path, held: dict[str, str], sentence: str
) -> None:
    other = Story(pool, corpora, tmp_path / "story")
    other.write(
        STAGES, {"en": {}, "zh": {}}, validation={"news": {"path": str(corpora / held["path"])}}
    )
    assert sentence.replace("{}", str(corpora)) in other.refused(*EVERY) and not other.run.exists()


def test_a_set_of_another_tokenizer_is_refused(pool: Pool, corpora: Path, tmp_path: Path) -> None:
    from megatron_chatflow.cli.preprocess import main

    words = [
        "--input",
        corpora / "en.jsonl",
        "--output-prefix",
        tmp_path / "bytes",
        "--workers",
        1,
        "--tokenizer-type",
        "ByteLevelTokenizer",
    ]
    assert main([str(word) for word in words]) == 0
    other = Story(pool, corpora, tmp_path / "story")
    other.write(
        STAGES,
        {"en": {}, "zh": {}},
        validation={"news": {"path": str(tmp_path / "bytes_text_document")}},
    )
    message = other.refused(*EVERY)
    assert (
        "validation news: bytes_text_document was made with the tokenizer bytes "
        "(ByteLevelTokenizer), not with tokenizer.model"
    ) in message
