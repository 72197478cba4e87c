"""to_json, from_json, fingerprint and first_difference."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.curriculum import PLAN_VERSION, BlendPlan, parse_curriculum
from megatron_chatflow.errors import ChatflowError
from tests.curriculum.cases import make_curriculum, make_plan, quick, stage_lists

N = 1000
STAGES = [
    {"at": 0, "weights": {"a": 1, "b": 2}},
    {"at": "50%", "weights": {"b": 1, "c": 1}, "ramp": "root2"},
]


@quick(40)
@given(stage_lists(N), stage_lists(N), st.integers(0, N))
def test_a_plan_survives_being_written_and_read(stages, edited, at):
    plan = make_plan(stages, N).amend(at=at, curriculum=make_curriculum(edited))
    again = BlendPlan.from_json(plan.to_json())
    assert again.domain_names == plan.domain_names
    assert np.array_equal(again.locate(0, N), plan.locate(0, N))
    assert (again.fingerprint(), again.to_json(), again.stages, again.domains) == (
        plan.fingerprint(),
        plan.to_json(),
        plan.stages,
        plan.domains,
    )
    assert again.first_difference(plan, N) is None


def test_capacities_survive_as_well():
    plan = make_plan(
        [{"at": 0, "weights": {"a": 1, "b": 2}}],
        N,
        capacities={"a": 100, "b": 10**6},
        on_exhausted="redistribute",
    )
    again = BlendPlan.from_json(plan.to_json())
    assert again.counts(N).tolist() == [100, 900]
    assert again.fingerprint() == plan.fingerprint()


def test_the_ledger_is_a_few_kilobytes_whatever_the_length_of_the_run():
    assert len(make_plan(STAGES, 10**11).to_json()) < 1000


def test_another_version_is_refused():
    ledger = json.loads(make_plan(STAGES, N).to_json())
    assert ledger["version"] == PLAN_VERSION
    ledger["version"] += 1
    with pytest.raises(ChatflowError, match="version: .* continue with the release"):
        BlendPlan.from_json(json.dumps(ledger))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', "3"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ChatflowError, match="not valid JSON; restore|is expected in a plan; give"):
        BlendPlan.from_json(text)


DAMAGE = {
    "no segments": lambda ledger: ledger.pop("segments"),
    "empty segments": lambda ledger: ledger["segments"].clear(),
    "late start": lambda ledger: ledger["segments"][0].update(start=5),
    "beyond the run": lambda ledger: ledger.update(num_samples=3),
    "unknown domain": lambda ledger: ledger["segments"][0]["stages"][0]["weights"].update(zzz=1),
    "negative weight": lambda ledger: ledger["segments"][0]["stages"][0]["weights"].update(a=-1),
    "text for a weight": lambda ledger: ledger["segments"][0]["stages"][0]["weights"].update(a="1"),
    "unknown ramp": lambda ledger: ledger["segments"][0]["stages"][1].update(ramp="bend"),
    "stages out of order": lambda ledger: ledger["segments"][0]["stages"].reverse(),
    "no weights": lambda ledger: ledger["segments"][0]["stages"][0].update(weights={}),
    "fraction of a sample": lambda ledger: ledger["segments"][0]["stages"][1].update(at=10.5),
    "unknown on_exhausted": lambda ledger: ledger.update(on_exhausted="shrug"),
    "domain of another shape": lambda ledger: ledger["domains"].update(a=[]),
    "size of another type": lambda ledger: ledger.update(seq_length="2048"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_ledger_is_refused(damage):
    ledger = json.loads(
        make_plan(STAGES, N).amend(at=100, curriculum=make_curriculum(STAGES)).to_json()
    )
    damage(ledger)
    with pytest.raises(ChatflowError, match="the plan is damaged .*; restore|seq_length: "):
        BlendPlan.from_json(json.dumps(ledger))


def test_the_fingerprint_knows_what_decides_the_order_and_nothing_else():
    def parsed(stages, folder="/corpora", **domain):
        domains = {name: {"path": name, **domain} for name in ("c", "b", "a")}
        stages = [{"name": f"other{i}", **stage} for i, stage in enumerate(stages)]
        return parse_curriculum(
            {"domains": domains, "stages": stages}, source="other.yaml", folder=folder
        )

    def fingerprint(curriculum, length=N, seq_length=16):
        return BlendPlan(
            curriculum, num_samples=length, global_batch_size=3, seq_length=seq_length
        ).fingerprint()

    plan = make_plan(STAGES, N).fingerprint()
    scaled = [
        {**stage, "weights": {name: 10 * w for name, w in reversed(stage["weights"].items())}}
        for stage in STAGES
    ]
    assert {
        fingerprint(parsed(s, f)) for s in (STAGES, scaled) for f in ("/corpora", "/elsewhere")
    } == {plan}
    moved = [STAGES[0], {**STAGES[1], "at": "51%"}]
    bent = [STAGES[0], {**STAGES[1], "ramp": "linear"}]
    tilted = [{"at": 0, "weights": {"a": 1, "b": 2.001}}, STAGES[1]]
    renamed = [{"at": 0, "weights": {"a": 1, "c": 2}}, STAGES[1]]
    others = {fingerprint(parsed(stages)) for stages in (moved, bent, tilted, renamed)}
    sizes = {fingerprint(parsed(STAGES), N + 1), fingerprint(parsed(STAGES), N, 17)}
    amended = make_plan(STAGES, N).amend(at=10, curriculum=make_curriculum(STAGES)).fingerprint()
    assert len(others | sizes | {plan, amended}) == 8


@quick(60)
@given(
    stage_lists(N, sizes=(1, 2, 5)),
    stage_lists(N, sizes=(1, 2, 5)),
    st.integers(0, N),
    st.integers(0, N),
)
def test_the_first_difference_is_what_a_comparison_one_by_one_finds(stages, edited, at, stop):
    plan = make_plan(stages, N)
    other = (
        plan.amend(at=at, curriculum=make_curriculum(edited)) if at % 3 else make_plan(edited, N)
    )
    located = [
        [
            (p.domain_names[d], j)
            for d, j in zip(*map(np.ndarray.tolist, p.locate(0, stop)), strict=True)
        ]
        for p in (plan, other)
    ]
    expected = next((n for n, (a, b) in enumerate(zip(*located, strict=True)) if a != b), None)
    assert plan.first_difference(other, stop) == other.first_difference(plan, stop) == expected


def test_plans_that_agree_are_compared_at_once_however_long_they_are():
    plan = make_plan(STAGES, 10**11)
    assert plan.first_difference(BlendPlan.from_json(plan.to_json()), 10**11) is None
    changed = make_plan([*STAGES, {"at": "60%", "weights": {"a": 1}, "ramp": "step"}], 10**11)
    assert plan.first_difference(changed, 6 * 10**10) is None
    assert 6 * 10**10 <= plan.first_difference(changed, 10**11) < 6 * 10**10 + 10


def test_a_shorter_run_differs_where_it_ends():
    plan, longer = (make_plan([{"at": 0, "weights": {"a": 1, "b": 1}}], n) for n in (50, 80))
    assert plan.first_difference(longer, 50) is None
    assert plan.first_difference(longer, 60) == longer.first_difference(plan, 80) == 50
