"""Words of scripts with combining marks: byte-level tokenizers are extended across the marks."""

import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.cli.tokenizer import extend_main as main
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import ExtensionResult, extend, open_vocabulary, replace
from megatron_chatflow.tokenizer.token_map import make_token_map
from megatron_chatflow.tokenizer.unicode_scripts import ZERO_WIDTH, letters_of
from tests.tokenizer import bases, samples
from tests.tokenizer.marks import (
    FRENCH,
    LATIN,
    LINES,
    byte_level,
    split_by,
    splitter,
)

KINDS = ("gpt2", "llama3")
NEW = 50


@pytest.fixture(scope="module")
def bases_of_all_kinds(tmp_path_factory):
    """Files of tokenizers, with a tokenizer_config.json that names the class of GPT-2's."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        bases.write_base(folder / kind, kind)
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "eos_token": "<|endoftext|>",
            "model_max_length": 77,
        }
        (folder / kind / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def open_kind(folder: Path, kind: str):
    return open_vocabulary("HuggingFaceTokenizer", str(folder / kind / "tokenizer.json"))


def three_tokenizers(folder: Path, outcome: ExtensionResult, source: Path):
    """Ours, that of `tokenizers` and that of `transformers`, next to the configuration of a
    model.
    """
    import transformers

    folder.mkdir(exist_ok=True)
    outcome.vocabulary.save(str(folder), str(source))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    ours = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ours, library, transformers.AutoTokenizer.from_pretrained(folder)


MIXED = st.lists(
    st.sampled_from([*LINES.values(), *samples.ODD, FRENCH]) | st.text(max_size=10), max_size=4
).map("".join)


@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama3", marks=pytest.mark.slow)])
def extended(request, bases_of_all_kinds, tmp_path_factory):
    """A vocabulary that was extended for all the scripts, and three readers of it."""
    base = open_kind(bases_of_all_kinds, request.param)
    outcome = extend(base, bases.corpus(*([line] * 20 for line in LINES.values())), 600)
    source = bases_of_all_kinds / request.param / "tokenizer.json"
    return (
        base,
        outcome,
        three_tokenizers(tmp_path_factory.mktemp("new") / request.param, outcome, source),
    )


@settings(max_examples=60)
@given(text=MIXED.filter(lambda text: "<|endoftext|>" not in text))
def test_all_libraries_agree_and_text_comes_back(extended, text):
    _, _, (ours, library, theirs) = extended
    ids = ours.encode(text)
    assert (
        ids
        == library.encode(text, add_special_tokens=False).ids
        == theirs.encode(text, add_special_tokens=False)
    )
    assert ours.decode(ids) == text


def test_latin_text_keeps_its_tokens(extended):
    base, _, (ours, _, _) = extended
    for text in (*LATIN[:1], *LATIN[1:21], *LATIN[-3:]):
        assert ours.encode(text) == base.encode([text])[0].tolist()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("\ufb2a\ufb4bם \ufb31\ufb4a \ufb2a\ufb4bם שלום טוב שלום", "\ufb01ne \ufb02ow"),
        ("ﻣﺮﺣﺒﺎ ﻋﻠﻴﻜﻢ", "\ufeffimport"),
        ("中文︰文字︰中文", "I ❤\ufe0f it"),
        ("ශ්\u200dරී ක්\u200dෂ", "“it’s” — …"),
    ],
    ids=["ligature", "byte order mark", "emoji", "quotes"],
)
def test_new_tokens_are_no_bytes_that_other_text_begins_with(line, text, bases_of_all_kinds):
    base = open_kind(bases_of_all_kinds, "gpt2")
    outcome = extend(base, bases.corpus([line] * 50), 8)
    assert outcome.vocabulary.encode([text])[0].tolist() == base.encode([text])[0].tolist()


def test_other_settings_of_the_tokenizer_stay(extended, bases_of_all_kinds):
    _, _, (ours, _, theirs) = extended
    assert theirs.model_max_length == 77 and theirs.eos_token_id == ours.eod


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", LINES)
def test_new_tokens_cross_marks(script, kind, bases_of_all_kinds):
    base = open_kind(bases_of_all_kinds, kind)
    outcome = extend(base, bases.corpus([LINES[script]] * 50), NEW)
    assert outcome.joined == [script]
    marks = {*letters_of(script).marks, *letters_of(script).signs, *ZERO_WIDTH}
    letters = {*letters_of(script).all} - marks
    texts = [token.text.decode(errors="ignore") for token in outcome.new]
    crossing = [
        text for text in texts if any(a in letters and b in marks for a, b in pairwise(text))
    ]
    assert len(crossing) >= 3
    assert all(len(splitter(kind)(text)) > 1 for text in crossing)
    old, before, after = (
        len(v.encode([LINES[script]])[0]) for v in (base, outcome.before, outcome.vocabulary)
    )
    assert after < 0.75 * min(old, before)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_tokens_across_marks_come_from_what_the_old_tokenizer_makes(
    kind, bases_of_all_kinds
):
    base = open_kind(bases_of_all_kinds, kind)
    outcome = extend(base, bases.corpus([LINES["KHMER"]] * 50), NEW)
    content = make_token_map("extend", base, outcome.vocabulary.size, outcome.new)
    old = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=bases_of_all_kinds / kind)
    count = 0
    for entry, token in zip(content["new"], outcome.new, strict=True):
        assert (
            b"".join(base.text[i] for i in entry["pieces"]) == token.text
            and max(entry["pieces"]) < base.size
        )
        text = token.text.decode(errors="ignore")
        if text.encode() == token.text:
            count += 1
            assert entry["pieces"] == old.encode(text)
            assert sum(entry["chars"]) == pytest.approx(len(text), abs=1e-4)
    assert count > NEW / 2


def test_old_merges_do_not_decide_the_rows_of_tokens_across_marks(bases_of_all_kinds, tmp_path):
    """An old token that the old pattern never let arise is no part of a new one."""
    content = json.loads(
        (bases_of_all_kinds / "gpt2" / "tokenizer.json").read_text(encoding="utf-8")
    )
    base = open_kind(bases_of_all_kinds, "gpt2")
    with_dead = base.changed((), extend(base, bases.corpus(["กิ"] * 50), 4).new)
    content["model"] = json.loads(with_dead.content)["model"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    old = open_vocabulary("HuggingFaceTokenizer", str(path))
    [merged] = old.split(["กิ".encode()])
    assert len(merged) == 1 and len(old.encode(["กิ"])[0]) == 2
    outcome = extend(old, bases.corpus(["กิน กินดี กินดี"] * 50), 6)
    assert len(outcome.before.encode(["กิ"])[0]) == 1
    for entry in make_token_map("extend", old, outcome.vocabulary.size, outcome.new)["new"]:
        assert merged[0] not in entry["pieces"]


def test_replaced_tokens_cross_marks_and_the_size_stays(bases_of_all_kinds):
    base = open_kind(bases_of_all_kinds, "gpt2")
    outcome = replace(
        base, bases.corpus([LINES["THAI"]] * 50), bases.corpus(bases.documents("en")[:60]), NEW
    )
    assert outcome.joined == ["THAI"] and outcome.vocabulary.size == base.size
    assert len(outcome.vocabulary.encode([LINES["THAI"]])[0]) < 0.75 * len(
        base.encode([LINES["THAI"]])[0]
    )


def test_a_tokenizer_is_extended_for_one_script_after_another(bases_of_all_kinds, tmp_path):
    thai = extend(open_kind(bases_of_all_kinds, "llama3"), bases.corpus([LINES["THAI"]] * 50), NEW)
    hindi = extend(thai.vocabulary, bases.corpus([LINES["DEVANAGARI"]] * 50), NEW)
    assert (thai.joined, hindi.joined) == (["THAI"], ["DEVANAGARI"])
    assert extend(hindi.vocabulary, bases.corpus(["กินดี อยู่ดี"] * 50), 3).joined == []
    assert (
        hindi.vocabulary.encode([LINES["THAI"]])[0].tolist()
        == thai.vocabulary.encode([LINES["THAI"]])[0].tolist()
    )


@pytest.mark.parametrize(
    "text",
    [
        "人人生而自由",
        "Minden emberi lény",
        "Все люди рождаются",
        unicodedata.normalize("NFD", "がぎぐ é"),
    ],
)
def test_the_pattern_stays_for_languages_without_marks_of_their_own(text, bases_of_all_kinds):
    base = open_kind(bases_of_all_kinds, "gpt2")
    outcome = extend(base, bases.corpus([text] * 50), 3)
    assert outcome.joined == [] and outcome.before is base
    assert (
        json.loads(outcome.vocabulary.content)["pre_tokenizer"]
        == json.loads(base.content)["pre_tokenizer"]
    )


def test_the_pattern_stays_where_single_characters_are_added(bases_of_all_kinds):
    assert (
        extend(
            open_kind(bases_of_all_kinds, "gpt2"),
            bases.corpus([LINES["THAI"]] * 50),
            20,
            characters=True,
        ).joined
        == []
    )


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            byte_level(add_prefix_space=True),
            "add_prefix_space true, with which the pattern .* marks of THAI",
        ),
        (
            split_by(r"[\p{Lu}\p{Ll}]+|\P{M}+|\p{M}+"),
            r"cuts THAI words at combining marks, and no pattern of it has letters as",
        ),
    ],
)
def test_patterns_that_cannot_take_marks_are_refused(step, message, bases_of_all_kinds, tmp_path):
    content = json.loads(
        (bases_of_all_kinds / "gpt2" / "tokenizer.json").read_text(encoding="utf-8")
    )
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(content | {"pre_tokenizer": step}), encoding="utf-8"
    )
    base = open_vocabulary("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))
    with pytest.raises(ChatflowError, match=message):
        extend(base, bases.corpus([LINES["THAI"]] * 50), NEW)


@pytest.mark.parametrize("script", LINES)
def test_sentencepiece_models_do_not_cut_at_marks(script, tmp_path):
    base = bases.open_base(tmp_path, "sentencepiece")
    line = LINES[script]
    outcome = extend(base, bases.corpus([line] * 50), NEW)
    crossing = [token.text.decode() for token in outcome.new if token.right is not None]
    marks = letters_of(script).marks + ZERO_WIDTH
    assert any(char in marks for text in crossing for char in text[1:])


def test_the_report_says_what_the_pattern_alone_changes(bases_of_all_kinds, tmp_path, capsys):
    (tmp_path / "hi.jsonl").write_text(
        "".join(json.dumps({"text": LINES["DEVANAGARI"]}) + "\n" for _ in range(50)),
        encoding="utf-8",
    )
    (tmp_path / "en.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in LATIN[1:9]), encoding="utf-8"
    )
    words = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        bases_of_all_kinds / "gpt2",
        "--input",
        tmp_path / "hi.jsonl",
    ]
    words += [
        "--held-out",
        f"hi={tmp_path / 'hi.jsonl'}",
        f"en={tmp_path / 'en.jsonl'}",
        "--new-tokens",
        NEW,
        "--output",
        tmp_path / "new",
    ]
    assert main([str(word) for word in words]) == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    tokens = report["marks_joined"]["tokens_without_new_ones"]
    assert report["marks_joined"]["scripts"] == ["DEVANAGARI"]
    assert (
        tokens["en"] == report["languages"]["en"]["before"]["tokens"]
        and tokens["hi"] > report["languages"]["hi"]["after"]["tokens"]
    )
    assert report["languages"]["en"]["unchanged_documents"] == 8
    assert "combining marks of Devanagari count as letters now" in capsys.readouterr().out
