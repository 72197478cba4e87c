"""Documents as sentences."""

import json
from unittest import mock

import nltk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

from megatron_chatflow.data import read_manifest
from megatron_chatflow.data.corpus.verify import verify
from megatron_chatflow.data.preprocess import pipeline
from megatron_chatflow.data.preprocess.options import PreprocessOptions
from megatron_chatflow.data.preprocess.pipeline import preprocess
from megatron_chatflow.data.preprocess.sentence_split import (
    NLTK_LANGUAGES,
    SentenceSplitting,
    choose_splitting,
    splitter,
)
from megatron_chatflow.errors import ChatflowError

EOD = 256


@pytest.fixture
def without_data(monkeypatch):
    """NLTK without its data."""
    monkeypatch.setattr(nltk.data, "path", [])


@pytest.fixture
def with_data(monkeypatch, tmp_path):
    """NLTK with a small model for English, in the format of punkt_tab: it knows one
    abbreviation.
    """
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name, content in (
        ("abbrev_types.txt", "approx"),
        ("sent_starters.txt", ""),
        ("collocations.tab", ""),
        ("ortho_context.tab", ""),
    ):
        (folder / name).write_text(content)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])


@pytest.fixture
def run(tmp_path):
    """A function: values under `text` and settings -> prefix, sentences of each document (end
    tokens as $), notes.
    """

    def go(values, **options):
        (tmp_path / "a.jsonl").write_text(
            "".join(json.dumps({"text": value}) + "\n" for value in values)
        )
        notes = []
        settings = PreprocessOptions(
            input=(str(tmp_path / "a.jsonl"),),
            output_prefix=str(tmp_path / "x"),
            tokenizer_type="ByteLevelTokenizer",
            **options,
        )
        with mock.patch.object(pipeline.logger, "info", notes.append):
            (prefix,) = preprocess(settings).corpora
        dataset = MegatronDataset(prefix)
        sentences = [
            bytes(36 if i == EOD else i for i in dataset[n]).decode() for n in range(len(dataset))
        ]
        bounds = dataset.document_indices.tolist()
        assert verify(prefix) == []
        return (
            prefix,
            [sentences[start:end] for start, end in zip(bounds, bounds[1:], strict=False)],
            notes,
        )

    return go


RULES = {
    "chinese": [
        (
            "他说：“你好。”然后走了。真的吗？！是的……我们走吧！",
            ["他说：“你好。”", "然后走了。", "真的吗？！", "是的……我们走吧！"],
        ),
        ('他说"好。"然后走。"再见。"', ['他说"好。"', "然后走。", '"再见。"']),
        ("标题\n第一句；（第二句。）第三句", ["标题", "第一句；", "（第二句。）", "第三句"]),
        ("版本 3.14 可用。", ["版本 3.14 可用。"]),
    ],
    "thai": [
        (
            "วันนี้อากาศดีมาก เราไปเที่ยวทะเลกัน\nคุณจะไปด้วยไหม? ฉันไป",
            ["วันนี้อากาศดีมาก", "เราไปเที่ยวทะเลกัน", "คุณจะไปด้วยไหม?", "ฉันไป"],
        ),
        ("ฉันใช้ Windows 10 ที่บ้าน", ["ฉันใช้ Windows 10 ที่บ้าน"]),
    ],
    "hungarian": [
        (
            "Lásd a 3. ábrát! Dr. Kiss kb. 5 perc alatt jön. Ez a vége.",
            ["Lásd a 3. ábrát!", "Dr. Kiss kb. 5 perc alatt jön.", "Ez a vége."],
        ),
        (
            "„Jó napot!” „Viszlát.” 2010. január 1-jén",
            ["„Jó napot!”", "„Viszlát.”", "2010. január 1-jén"],
        ),
        ("Cím\n\nElső sor\nmásodik sor", ["Cím", "Első sor\nmásodik sor"]),
    ],
    "english": [
        (
            "Mr. J. Smith paid $3.50 (e.g. in 2010.) Then he left... Why?",
            ["Mr. J. Smith paid $3.50 (e.g. in 2010.)", "Then he left...", "Why?"],
        ),
        ("1. Open it. 2. Close it.", ["1. Open it.", "2. Close it."]),
    ],
}


@pytest.mark.parametrize(
    ("lang", "text", "expected"), [(lang, *case) for lang, cases in RULES.items() for case in cases]
)
def test_rules_find_the_sentences(without_data, lang, text, expected):
    assert splitter(choose_splitting(lang, keep_newlines=False))(text) == expected


@given(
    st.text(st.sampled_from("aA.!?…。！；”\"' \n\t\u3000ก3(é")),
    st.sampled_from(["ideographic", "thai", "general"]),
)
def test_with_newlines_kept_the_sentences_are_the_text(text, rule):
    kept = splitter(SentenceSplitting("", rule, True))(text)
    assert "".join(kept) in text and "".join(kept).split() == text.split()
    assert [sentence.strip() for sentence in kept] == splitter(SentenceSplitting("", rule, False))(
        text
    )


@pytest.mark.parametrize("rule", ["ideographic", "thai", "general"])
@pytest.mark.parametrize("text", [".", "!", " ", "\n", " \n", "a. ", '"', '."', "ก ", '。"', "a"])
def test_a_rule_takes_time_in_proportion_to_the_text(rule, text):
    splitter(SentenceSplitting("", rule, False))(text * 200_000)  # quadratic would be hours


def test_punkt_is_used_where_its_data_is(with_data, run):
    text = "It takes approx. Five minutes. The end.\nNew line."
    prefix, documents, notes = run([text], split_sentences=True)
    assert documents == [["It takes approx. Five minutes.", "The end.", "New line."]]
    assert notes == []
    how = read_manifest(prefix).sources[0]
    assert (how["lang"], how["sentences"]) == ("english", "punkt")
    assert run([text], split_sentences=True, keep_newlines=True)[1] == [
        ["It takes approx. Five minutes. ", "The end.\n", "New line."]
    ]


def test_without_data_a_rule_is_used_and_one_line_says_so(without_data, run):
    prefix, documents, notes = run(["One. Two.", "Three."], split_sentences=True, append_eod=True)
    assert prefix.endswith("x_text_sentence")
    assert documents == [["One.", "Two.$"], ["Three.$"]]
    (note,) = notes
    assert note.startswith("NLTK has no data for english here, so sentences are split by a rule")
    assert read_manifest(prefix).sources[0]["sentences"] == "general"


def test_chinese_and_thai_need_no_data_and_say_nothing(without_data, run):
    _, documents, notes = run(["好。真的？", "\n"], split_sentences=True, lang="chinese")
    assert (documents, notes) == ([["好。", "真的？"]], [])


@pytest.mark.parametrize("split", [False, True])
def test_lists_under_the_key_are_sentences_already(without_data, run, split):
    prefix, documents, _ = run(
        [["A. B.", "", "C"], "D", [], [""]], split_sentences=split, append_eod=True
    )
    assert documents == [["A. B.", "C$"], ["D$"]]
    manifest = read_manifest(prefix)
    assert (manifest.documents, manifest.bytes, manifest.sources[0]["empty"]) == (2, 7, 2)


def test_an_unknown_language_is_refused_with_those_that_are_known(run):
    with pytest.raises(
        ChatflowError,
        match="--lang klingon is unknown to --split-sentences: give one of chinese, czech,",
    ) as error:
        run(["a"], split_sentences=True, lang="klingon")
    assert all(lang in str(error.value) for lang in NLTK_LANGUAGES)
