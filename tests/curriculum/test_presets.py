"""Presets: what each means, what is refused, and that a ledger keeps what a preset meant."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_chatflow.curriculum import (
    BlendPlan,
    Curriculum,
    keep_expansion,
    load_curriculum,
    parse_curriculum,
    preset_lines,
)
from megatron_chatflow.curriculum.presets import PRESETS, ROLES, expand
from megatron_chatflow.errors import ConfigError
from tests.pool import command

ROLES_OF_FILE = {"source": "en", "target": "zh", "parallel": "en-zh", "instruct": "chat"}
DOMAINS = {name: {"path": name} for name in ROLES_OF_FILE.values()}


def parse(preset: object, **top: object) -> Curriculum:
    content = {"domains": DOMAINS, "preset": preset, **top}
    return parse_curriculum(content, source="test.yaml", folder="/corpora")


def plan_of(curriculum: Curriculum, num_samples: int = 1000) -> BlendPlan:
    return BlendPlan(curriculum, num_samples=num_samples, global_batch_size=8, seq_length=64)


@pytest.fixture
def redefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later release in which english-first-10 ends its first stage at 60%."""
    old = PRESETS["english-first-10"]
    stages = (old.stages[0], replace(old.stages[1], at=60))
    new = {**PRESETS, "english-first-10": replace(old, stages=stages)}
    monkeypatch.setattr("megatron_chatflow.curriculum.presets.PRESETS", new)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_accepts_all_four_roles_and_gives_shares_to_those_it_reads(name: str) -> None:
    plan = plan_of(parse({"name": name, **ROLES_OF_FILE}))
    read = {ROLES_OF_FILE[role] for role in PRESETS[name].roles}
    counts = dict(zip(plan.domain_names, plan.counts(1000), strict=True))
    assert {name for name, count in counts.items() if count} == read
    assert set(PRESETS[name].roles) <= set(ROLES)


def test_source_text_is_read_in_the_first_tenth_of_the_run_only() -> None:
    plan = plan_of(parse({"name": "english-first-10", "source": "en", "target": "zh"}))
    en = plan.domain_names.index("en")
    assert plan.counts(100)[en] == plan.counts(1000)[en] == 20


def test_replay_has_three_tenths_of_source_text_throughout() -> None:
    plan = plan_of(parse({"name": "replay-30", "source": "en", "target": "zh"}))
    en = plan.domain_names.index("en")
    assert [plan.shares(n)[en] for n in (0, 500, 999)] == pytest.approx([0.3] * 3, abs=1e-12)


def test_chatflow_moves_from_source_and_parallel_to_target_and_instruction_text() -> None:
    plan = plan_of(parse({"name": "chatflow", **ROLES_OF_FILE}))
    first, last = (dict(zip(plan.domain_names, plan.shares(n), strict=True)) for n in (0, 1000))
    assert first["en"] > last["en"] and first["en-zh"] > last["en-zh"]
    assert first["zh"] < last["zh"] and first["chat"] == 0 < last["chat"]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("chatflow", "preset: a mapping is expected, found text; write `{name: replay-30,"),
        ({"source": "en"}, "preset.name: it is missing; write one of chatflow, english-first-10"),
        ({"name": "chatflo"}, "preset.name: 'chatflo' is unknown, did you mean 'chatflow'?"),
        (
            {"name": "chatflow", "source": "en", "target": "zh", "instruct": "chat"},
            "preset.parallel: it is missing, and preset chatflow reads source, target, parallel, "
            "instruct; write `parallel: DOMAIN`",
        ),
        (
            {"name": "replay-30", "source": "en", "target": "chn"},
            "preset.target: domain 'chn' is unknown",
        ),
        (
            {"name": "replay-30", "source": "en", "target": None},
            "preset.target: domain None is unknown",
        ),
        (
            {"name": "replay-30", "source": "en", "target": "en"},
            "preset.target: domain 'en' is already the source; give each role its own domain",
        ),
        (
            {"name": "replay-30", "sorce": "en", "target": "zh"},
            "preset.sorce: unknown role, did you mean 'source'?; the roles are source, target",
        ),
    ],
)
def test_what_is_wrong_in_a_preset_is_one_message(preset: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse(preset)
    assert str(error.value).startswith("test.yaml: preset") and "\n" not in str(error.value)


def test_a_file_has_stages_or_a_preset() -> None:
    stages = [{"name": "a", "at": 0, "weights": {"en": 1}}]
    with pytest.raises(ConfigError, match="preset: stages are given as well as preset 'replay-30'"):
        parse({"name": "replay-30", "source": "en", "target": "zh"}, stages=stages)


@pytest.mark.parametrize("name", PRESETS)
def test_the_printed_stages_are_what_the_preset_means(name: str) -> None:
    curriculum = parse({"name": name, **ROLES_OF_FILE})
    assert curriculum.preset is not None
    lines = list(preset_lines(curriculum.preset))
    stages = yaml.safe_load("\n".join(line for line in lines if line.startswith("  - ")))
    content = {"domains": DOMAINS, "stages": stages}
    assert parse_curriculum(content, source="test.yaml", folder="/corpora") == curriculum
    content = curriculum.to_mapping()
    assert parse_curriculum(content, source="test.yaml", folder="/corpora") == curriculum
    assert PRESETS[name].paper in lines[0] and any(line.startswith("  ours: ") for line in lines)


def test_a_ledger_keeps_the_expansion_under_a_later_definition(redefined: None) -> None:
    curriculum = parse({"name": "english-first-10", "source": "en", "target": "zh"})
    old = replace(
        curriculum, stages=expand(PRESETS["english-first-10"], {"source": "en", "target": "zh"})
    )
    assert curriculum.preset and old.stages != curriculum.stages
    old = replace(old, preset=replace(curriculum.preset, stages=old.stages))
    ledger = BlendPlan.from_json(plan_of(old).to_json())
    assert ledger.preset == old.preset == BlendPlan.from_json(ledger.to_json()).preset
    kept = keep_expansion(curriculum, ledger.preset)
    assert kept.stages == old.stages and kept.preset == old.preset
    longer = ledger.follow(plan_of(kept, 2000))
    assert longer.fingerprint() == plan_of(old, 2000).fingerprint()
    assert ledger.preset
    assert "this release defines the preset otherwise" in list(preset_lines(ledger.preset))[-1]


def test_another_preset_or_other_roles_are_followed_as_the_file_says() -> None:
    kept = parse({"name": "replay-30", "source": "en", "target": "zh"}).preset
    for other in (
        {"name": "replay-30", "source": "zh", "target": "en"},
        {"name": "english-first-10", "source": "en", "target": "zh"},
    ):
        curriculum = parse(other)
        assert keep_expansion(curriculum, kept) is curriculum
        assert keep_expansion(curriculum, None) is curriculum


def test_a_damaged_preset_in_a_ledger_is_refused() -> None:
    ledger = json.loads(plan_of(parse({"name": "replay-30", **ROLES_OF_FILE})).to_json())
    for change in ({"roles": {"source": "fr"}}, {"stages": []}, {"stages": [{"at": "soon"}]}):
        damaged = {**ledger, "preset": {**ledger["preset"], **change}}
        with pytest.raises(ConfigError, match="the plan is damaged"):
            BlendPlan.from_json(json.dumps(damaged))


def test_plan_prints_the_expansion_and_that_of_the_ledger_for_a_run(
    sample: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domains = load_curriculum(sample / "curriculum.yaml").to_mapping()["domains"]
    path = tmp_path / "preset.yaml"
    roles = {"source": "en", "target": "zh"}
    preset = {"name": "english-first-10", **roles}
    path.write_text(yaml.safe_dump({"domains": domains, "preset": preset}), encoding="utf-8")
    words = ("plan", "--config", str(sample / "run.yaml"), "--curriculum", str(path))
    code, out, err = command(*words)
    assert code == 0, err
    assert out.startswith("preset english-first-10 (arXiv 2506.00288): source en, target zh\n")
    assert "stage target: samples 16 to 159" in out and "instruct gets no sample" in out

    # A run of 10 iterations that followed the preset when its source stage ended at 60%.
    old = PRESETS["english-first-10"]
    stages = (old.stages[0], replace(old.stages[1], at=60))
    began = load_curriculum(path)
    assert began.preset
    kept = replace(began.preset, stages=expand(replace(old, stages=stages), roles))
    state = json.loads((reference / "iter_0000010" / "state.json").read_text())
    state["plan"] = BlendPlan(
        replace(began, stages=kept.stages, preset=kept),
        num_samples=160,
        global_batch_size=8,
        seq_length=64,
    ).to_json()
    state.pop("sealed", None)
    run = tmp_path / "run"
    shutil.copytree(
        reference / "iter_0000010",
        run / "iter_0000010",
        ignore=shutil.ignore_patterns("manifest.json"),
    )
    (run / "latest_checkpointed_iteration.txt").write_text("10\n")
    (run / "iter_0000010" / "state.json").write_text(json.dumps(state))
    code, out, err = command(*words, "--load", str(run))
    assert code == 0, err
    assert "stage target: samples 96 to 159" in out and "the run keeps these stages" in out
