"""The curriculum file: what it means, and one message for everything that is wrong in it."""

import os
import time

import pytest
import yaml

from megatron_chatflow.curriculum import (
    Curriculum,
    constant_curriculum,
    load_curriculum,
    parse_curriculum,
)
from megatron_chatflow.errors import ChatflowError
from tests.curriculum.cases import GOOD


def load(tmp_path, text: str) -> Curriculum:
    (tmp_path / "curriculum.yaml").write_text(text, encoding="utf-8")
    return load_curriculum(tmp_path / "curriculum.yaml")


def test_the_documented_file_is_read_as_documented(tmp_path):
    c = load(tmp_path, GOOD)
    assert (c.clock, c.on_exhausted, list(c.domains)) == (
        "samples",
        "repeat",
        ["en", "zh", "en-zh", "instruct"],
    )
    assert c.domains["zh"].path == str(tmp_path / "data/zh_text_document")
    assert [(d.kind, d.max_epochs) for d in c.domains.values()] == [
        ("text", None),
        ("text", 4),
        ("text", None),
        ("instruct", None),
    ]
    assert [(s.name, s.at, s.relative, s.ramp) for s in c.stages[1:]] == [
        ("bilingual", 40, True, "root2"),
        ("instruct", 90, True, "linear"),
    ]
    assert c.stages[0].weights == {"en": 0.7, "en-zh": 0.3}


def test_defaults_are_samples_repeat_text_and_linear(tmp_path):
    c = load(
        tmp_path,
        (
            "domains: {a: {path: /x/a}}\nstages: [{name: s, at: 0, weights: {a: 1}}, {name: t, "
            "at: 5, weights: {a: 1}}]"
        ),
    )
    assert (
        c.clock,
        c.on_exhausted,
        c.domains["a"].kind,
        c.domains["a"].path,
        c.stages[1].ramp,
    ) == ("samples", "repeat", "text", "/x/a", "linear")


def test_names_that_older_yaml_takes_for_truth_values_are_languages_and_1e6_is_a_number(tmp_path):
    text = "clock: tokens\ndomains: {no: {path: a}, on: {path: b}, zh: {path: c}}\n"
    c = load(
        tmp_path,
        text
        + (
            "stages: [{name: s, at: 0, weights: {no: 1e-3, on: 1}}, {name: t, at: 1e6, weights: "
            "{zh: 2.5E+1}}]"
        ),
    )
    assert list(c.domains) == ["no", "on", "zh"]
    assert (c.stages[0].weights, c.stages[1].at, c.stages[1].weights) == (
        {"no": 0.001, "on": 1},
        1e6,
        {"zh": 25},
    )


def test_prompts_are_trained_on_where_the_file_says_so(tmp_path):
    assert not any(d.train_on_prompt for d in load(tmp_path, GOOD).domains.values())
    c = load(tmp_path, change("kind: instruct", "kind: instruct, train_on_prompt: true"))
    assert [name for name, d in c.domains.items() if d.train_on_prompt] == ["instruct"]
    assert (
        not load(tmp_path, change("kind: instruct", "kind: instruct, train_on_prompt: false"))
        .domains["instruct"]
        .train_on_prompt
    )


@pytest.mark.parametrize("keys", ["kind: instruct", "kind: instruct, train_on_prompt: true"])
def test_a_curriculum_survives_being_written_as_yaml(tmp_path, keys):
    c = load(tmp_path, change("kind: instruct", keys))
    text = yaml.safe_dump(c.to_mapping(), sort_keys=False)
    again = load(tmp_path, text)
    assert again == c


def change(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


WRONG = {
    "unknown key at the top": (
        change("clock:", "clok:"),
        "clok: unknown key, did you mean 'clock'?; the keys here are clock, domains",
    ),
    "unknown key of a domain": (
        change("max_epochs: 4", "max_epoch: 4"),
        "domains.zh.max_epoch: unknown key, did you mean 'max_epochs'?",
    ),
    "unknown key of a stage": (
        change("ramp: root2", "rmap: root2"),
        "stages[2].rmap: unknown key, did you mean 'ramp'?",
    ),
    "unknown clock": (
        change("clock: samples", "clock: sample"),
        "clock: 'sample' is unknown, did you mean 'samples'?; choose one of samples,",
    ),
    "unknown on_exhausted": (
        change("on_exhausted: repeat", "on_exhausted: off"),
        "on_exhausted: 'off' is unknown; choose one of repeat",
    ),
    "unknown kind": (
        change("kind: instruct", "kind: instruction"),
        "domains.instruct.kind: 'instruction' is unknown, did you mean 'instruct'?",
    ),
    "unknown ramp": (
        change("root2", "cosin"),
        (
            "stages[2] (bilingual).ramp: 'cosin' is unknown, did you mean 'cosine'?; choose one "
            "of step, linear"
        ),
    ),
    "ramp without a power": (
        change("root2", "root"),
        "stages[2] (bilingual).ramp: 'root' is unknown, did you mean 'root2'?",
    ),
    "unknown domain": (
        change("zh: 0.5", "zho: 0.5"),
        "stages[2] (bilingual).weights: domain 'zho' is unknown, did you mean 'zh'?; name it",
    ),
    "negative weight": (
        change("en: 0.7", "en: -1"),
        "stages[1] (english).weights.en: -1 is negative; write 0 or a positive number",
    ),
    "weight that is no number": (
        change("en: 0.7", "en: lots"),
        "stages[1] (english).weights.en: a number is expected, found text 'lots'; write",
    ),
    "weight in quotes": (
        change("en: 0.7", "en: '0.7'"),
        "stages[1] (english).weights.en: a number is expected, found text '0.7'",
    ),
    "weight true": (
        change("en: 0.7", "en: true"),
        "stages[1] (english).weights.en: a number is expected, found a truth value True",
    ),
    "weight nan": (
        change("en: 0.7", "en: .nan"),
        "stages[1] (english).weights.en: nan is not a finite number; write a finite one",
    ),
    "weight inf": (change("en: 0.7", "en: .inf"), "stages[1] (english).weights.en: inf is not"),
    "weight beyond floats": (
        change("en: 0.7", f"en: 1{'0' * 400}"),
        "stages[1] (english).weights.en: the number is too large",
    ),
    "all weights zero": (
        change("{en: 0.7, en-zh: 0.3}", "{en: 0, en-zh: 0.0}"),
        "stages[1] (english).weights: no weight is positive; give",
    ),
    "no weights": (
        change(",   weights: {en: 0.7, en-zh: 0.3}", ""),
        "stages[1] (english).weights: it is missing; write",
    ),
    "weights as a list": (
        change("{en: 0.7, en-zh: 0.3}", "[0.7, 0.3]"),
        "stages[1] (english).weights: a mapping is expected, found a list",
    ),
    "first stage late": (
        change("at: 0, ", "at: 5, "),
        "stages[1] (english).at: the first stage begins at 5; let the first stage begin at 0",
    ),
    "out of order": (
        change("at: 90%", "at: 30%"),
        "(instruct).at: 30% comes before the stage above it, 'bilingual' at 40%; list the stages",
    ),
    "two at one place": (
        change("at: 90%", "at: 40.0%"),
        "stages[3] (instruct).at: stages 'bilingual' and 'instruct' both begin at 40%; move one",
    ),
    "two at the start": (
        change("at: 40%", "at: 0%"),
        "stages[2] (bilingual).at: stages 'english' and 'bilingual' both begin at 0%",
    ),
    "beyond the run": (
        change("at: 90%", "at: 101%"),
        "stages[3] (instruct).at: 101% is beyond the end of the run; write at most 100%",
    ),
    "before the run": (
        change("at: 40%", "at: -3"),
        "stages[2] (bilingual).at: -3 is negative; write 0 or more",
    ),
    "no percentage": (
        change("at: 40%", "at: half%"),
        "stages[2] (bilingual).at: 'half%' is not a percentage; write one such as 40%",
    ),
    "nan percentage": (
        change("at: 40%", "at: nan%"),
        "stages[2] (bilingual).at: nan is not a finite number",
    ),
    "no at": (
        change("at: 40%, ", ""),
        "stages[2] (bilingual).at: it is missing; write where the stage begins",
    ),
    "no stage name": (
        change("name: bilingual, ", ""),
        "stages[2].name: no name is given; give the stage a name",
    ),
    "one stage name twice": (
        change("name: instruct,", "name: english,"),
        "stages[3].name: two stages are called 'english'; give each its own name",
    ),
    "no domains": ("stages: []", "domains: no domain is named; write at least one"),
    "domains as a list": (
        "domains: [a]\nstages: []",
        "domains: a mapping is expected, found a list; write at least one",
    ),
    "no stages": ("domains: {a: {path: x}}", "stages: no stage is given; write at least one"),
    "stages as a mapping": (
        "domains: {a: {path: x}}\nstages: {a: 1}",
        "stages: a list is expected, found a mapping; write",
    ),
    "stage as text": (
        "domains: {a: {path: x}}\nstages: [a]",
        "stages[1]: a mapping is expected, found text; write",
    ),
    "domain as text": (
        "domains: {a: x}\nstages: [a]",
        "domains.a: a mapping is expected, found text; write `{path: prefix}`",
    ),
    "no path": (
        change("{path: data/en_text_document}", "{}"),
        "domains.en.path: no path is given; write the prefix",
    ),
    "path with ending": (
        change("data/en_text_document", "data/en.bin"),
        "en.bin' ends with .bin; write the prefix, without the ending",
    ),
    "path a number": (
        change("data/en_text_document", "7"),
        "domains.en.path: text is expected, found a number; write",
    ),
    "max_epochs zero": (
        change("max_epochs: 4", "max_epochs: 0"),
        "domains.zh.max_epochs: 0 is not positive; write how often",
    ),
    "train_on_prompt as text": (
        change("kind: instruct", "kind: instruct, train_on_prompt: 'yes'"),
        (
            "domains.instruct.train_on_prompt: a truth value is expected, found text 'yes'; "
            "write true or false"
        ),
    ),
    "train_on_prompt of text": (
        change("max_epochs: 4", "train_on_prompt: true"),
        (
            "domains.zh.train_on_prompt: a domain of kind text has no prompts, all of it is "
            "trained on; drop the key, or write `kind: instruct`"
        ),
    ),
    "domain name a number": (
        "domains: {1: {path: x}}\nstages: [a]",
        "domains: the name 1 is a number, not text; put it in quotes",
    ),
    "domain name with slash": (
        "domains: {a/b: {path: x}}\nstages: [a]",
        "domains: 'a/b' is not a valid name for a domain; use letters",
    ),
    "key twice": (
        change("zh:       {path", "en:       {path"),
        "key 'en' comes twice, the second time in line 5; keep one",
    ),
    "weight twice": (
        change("zh: 0.5", "en: 0.5"),
        "key 'en' comes twice, the second time in line 10; keep one",
    ),
    "key at the top twice": (
        GOOD + "clock: tokens\n",
        "key 'clock' comes twice, the second time in line 13; keep one",
    ),
    "not YAML": ("domains: {a: [", "not valid YAML in line 1"),
    "no mapping": (
        "- 1",
        "curriculum: a mapping is expected, found a list; write clock, domains and stages",
    ),
    "empty": ("", "curriculum: a mapping is expected, found nothing; write"),
}


@pytest.mark.parametrize(("text", "part"), WRONG.values(), ids=WRONG.keys())
def test_an_error_is_one_message_with_file_key_value_and_fix(tmp_path, text, part):
    with pytest.raises(ChatflowError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'curriculum.yaml'}: ")
    assert part in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        ChatflowError, match=r"nowhere.yaml: cannot be read \(No such file or directory\); give"
    ):
        load_curriculum(tmp_path / "nowhere.yaml")
    with pytest.raises(ChatflowError, match="cannot be read"):
        load_curriculum(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"domains: \xff\xfe")
    with pytest.raises(ChatflowError, match="it is not UTF-8 text"):
        load_curriculum(tmp_path / "latin.yaml")


def test_a_mapping_that_is_already_loaded_gets_the_same_checks():
    mapping = yaml.safe_load(GOOD)
    assert (
        parse_curriculum(mapping, source="run.yaml", folder="/x").domains["en"].path
        == "/x/data/en_text_document"
    )
    mapping["stages"][0]["weights"]["en"] = -2
    with pytest.raises(
        ChatflowError, match=r"^run.yaml: stages\[1\] \(english\).weights.en: -2 is negative"
    ):
        parse_curriculum(mapping, source="run.yaml", folder="/x")


def test_a_data_path_is_a_constant_curriculum_named_after_its_corpora():
    c = constant_curriculum([(0.3, "data/en_text_document"), (7, "/abs/zh_document"), (0, "plain")])
    assert [(d.name, d.path) for d in c.domains.values()] == [
        ("en", os.path.abspath("data/en_text_document")),
        ("zh", "/abs/zh_document"),
        ("plain", os.path.abspath("plain")),
    ]
    assert [(s.at, s.weights) for s in c.stages] == [(0, {"en": 0.3, "zh": 7, "plain": 0})]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [(1, "x/a_text_document"), (1, "y/a_document")],
            "--data-path: y/a_document and x/a_text_document would both be called 'a'; write",
        ),
        ([(-1, "a")], "--data-path: stages[1] (constant).weights.a: -1 is negative"),
        ([(0, "a")], "no weight is positive"),
        ([], "--data-path: no corpus is given"),
    ],
)
def test_a_wrong_data_path_is_refused(pairs, message):
    with pytest.raises(ChatflowError) as caught:
        constant_curriculum(pairs)
    assert message in str(caught.value)


def test_ten_thousand_stages_are_read_in_time_linear_in_their_number(tmp_path):
    weights = "weights: {en: 0.7, zh: 0.3}"
    path = tmp_path / "many.yaml"
    for at in (lambda i: i * 100, lambda i: f"{i / 100}%"):
        stages = "".join(f"  - {{name: s{i}, at: {at(i)}, {weights}}}\n" for i in range(10_000))
        path.write_text(f"domains: {{en: {{path: a}}, zh: {{path: b}}}}\nstages:\n{stages}")
        begin = time.process_time()
        assert len(load_curriculum(path).stages) == 10_000
        assert time.process_time() - begin < 4


def test_numbers_and_percentages_are_each_in_order():
    def stages(*places):
        entries = [{"name": f"s{i}", "at": at, "weights": {"en": 1}} for i, at in enumerate(places)]
        return parse_curriculum(
            {"domains": {"en": {"path": "a"}}, "stages": entries}, source="f", folder="/"
        )

    assert len(stages(0, "10%", 500, "20%", 600).stages) == 5
    assert len(stages("0%", 5, "1%").stages) == 3
    for places in (
        (0, "20%", 500, "10%"),
        (0, 500, "20%", 400),
        (0, 500, "20%", 500),
        (0, "0%"),
        ("0%", 0),
    ):
        with pytest.raises(ChatflowError, match="before the stage above it|both begin at"):
            stages(*places)
