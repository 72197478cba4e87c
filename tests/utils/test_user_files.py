"""What users write is read, or refused with one message, however it is nested and whatever it
repeats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.checkpoint.integrity import damage_at_first_sight
from megatron_chatflow.checkpoint.run_directory import read_state
from megatron_chatflow.config.loader import load_values
from megatron_chatflow.conversion.safetensors_io import read_json
from megatron_chatflow.curriculum import BlendPlan, load_curriculum, parse_curriculum
from megatron_chatflow.data.corpus.manifest import read_manifest
from megatron_chatflow.data.preprocess.resume_state import load_state
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.utils.user_files import dump_yaml, load_json, load_yaml, visible

DEEP = "[" * 100_000 + "]" * 100_000
DEEP_YAML = {
    "flow": "[" * 3000 + "]" * 3000,
    "block": "- " * 3000 + "x",
    "mapping": "\n".join(" " * i + "a:" for i in range(3000)),
}
text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029")
)  # PyYAML does not escape these
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(values)
def test_what_is_dumped_is_read_back(value: Any):
    assert load_yaml(dump_yaml(value)) == value


@settings(deadline=None)
@given(values)
def test_what_another_program_dumps_is_read_as_it_reads_it(value: Any):
    text = json.dumps(value)
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:
        return
    if expected == value:  # YAML 1.1 reads 1e5 as text
        assert load_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("1e6", 1e6),
        ("1_000", 1000),
        ("010", 10),
        ("0x1F", 31),
        ("-.inf", -float("inf")),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("", None),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}\n", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("a: {<<: {b: 1}, b: 2}", {"a": {"b": 2}}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any):
    assert load_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        *[(text, ["nested more than 100 levels"]) for text in DEEP_YAML.values()],
        ("a: 1\na: 2\n", ["'a' comes twice", "line 2"]),
        ("a: {1: x, 1: y}", ["1 comes twice"]),
        ("a: {<<: {b: 1}, <<: {b: 2}}", ["'<<' comes twice"]),
        ("a: *b", ["*b"]),
        ("a: &b [*b]", ["*b"]),
        ("{a: 1}: 2", ["the key in line 1"]),
        ("!!python/object:os.system x", ["tag"]),
        ("a: 1\n---\nb: 2\n", ["second document", "line 2"]),
        ("a: [", ["not valid YAML in line 1"]),
        ("a: \0", ["not valid YAML"]),
        ("9" * 10_000, ["is not a number", "line 1"]),
    ],
)
def test_what_cannot_be_read_is_one_message(text: str, parts: list[str]):
    with pytest.raises(ChatflowError) as error:
        load_yaml(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert all(part in str(error.value) for part in parts), error.value


def test_a_section_that_comes_twice_in_a_file_of_settings_is_refused(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {lr: 1}\nmodel: {num_layers: 2}\ntraining: {lr: 2}\n")
    with pytest.raises(ChatflowError, match="'training' comes twice, the second time in line 3"):
        load_values(path)


@pytest.mark.parametrize("text", DEEP_YAML.values(), ids=DEEP_YAML)
def test_deep_settings_and_curricula_are_one_message(tmp_path: Path, text: str):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (load_values, load_curriculum):
        with pytest.raises(ChatflowError, match="levels deep") as error:
            read(path)
        assert str(error.value).count(str(path)) == 1 and "\n" not in str(error.value)


def test_deep_json_is_one_message_wherever_a_file_is_read(tmp_path: Path):
    for name in ("a.json", "state.json", "manifest.json", "tokenizer.json", "config.json"):
        (tmp_path / name).write_text(DEEP)
    tokenizer = {"tokenizer_type": "TikTokenizer", "tokenizer_model": str(tmp_path / "a.json")}
    for read in (
        lambda: load_json(DEEP),
        lambda: read_manifest(tmp_path / "a"),
        lambda: read_state(tmp_path),
        lambda: read_json(tmp_path / "config.json"),
        lambda: load_state(str(tmp_path), {}),
        lambda: BlendPlan.from_json(DEEP),
        lambda: load_tokenizer(**tokenizer),
        lambda: load_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path)),
    ):
        with pytest.raises(ChatflowError) as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert "manifest.json is damaged" in damage_at_first_sight(tmp_path)


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\u2028"])
def test_a_setting_with_a_control_character_is_refused_by_its_name(tmp_path: Path, character: str):
    path = tmp_path / "run.yaml"
    for section, name, value in (
        ("checkpoint", "save", f"a{character}b"),
        ("data", "data_path", ["1", f"a{character}b"]),
        ("tokenizer", "tokenizer_model", f"a{character}b"),
    ):
        path.write_text(dump_yaml({section: {name: value}}))
        with pytest.raises(ChatflowError, match=name) as error:
            load_values(path)
        assert character not in str(error.value)


def curriculum(**changes: Any) -> dict[str, Any]:
    domain = {"path": "a"} | changes.get("domain", {})
    stage = {"name": "one", "at": 0, "weights": {"en": 1}} | changes.get("stage", {})
    return {"domains": {"en": domain}, "stages": [stage]} | changes.get("top", {})


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\u2028"])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda text: curriculum(domain={"path": text}), "domains.en.path"),
        (lambda text: curriculum(domain={"valid": text}), "domains.en.valid"),
        (lambda text: curriculum(stage={"name": text}), "stages[1].name"),
        (lambda text: curriculum(top={"validation": {text: {"path": "b"}}}), "validation"),
        (lambda text: curriculum(top={"validation": {"v": {"path": text}}}), "validation.v.path"),
        (lambda text: curriculum(top={"domains": {text: {"path": "b"}}}), "domains"),
    ],
)
def test_a_name_or_a_path_with_a_control_character_is_refused(change, key: str, character: str):
    with pytest.raises(ChatflowError) as error:
        parse_curriculum(change(f"a{character}b"), source="file", folder="/")
    assert str(error.value).startswith(f"file: {key}: ") and character not in str(error.value)


def test_a_message_stays_on_its_line():
    assert visible("a\nb\x1b[0m é") == "a\\nb\\x1b[0m é"
