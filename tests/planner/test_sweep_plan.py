"""The runs of a sweep: every cell once, trunks that are shared, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_chatflow.curriculum import load_curriculum
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.parameters import flops_per_token
from megatron_chatflow.planner.sweep_file import load_sweep
from megatron_chatflow.planner.sweep_plan import PlannedRun, length_name, plan_runs
from megatron_chatflow.utils.user_files import dump_yaml

BASE: dict[str, Any] = {
    "model": {"position_embedding_type": "rope", "swiglu": True, "add_bias_linear": False},
    "training": {"micro_batch_size": 2, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3, "lr_warmup_iters": 2, "min_lr": 1e-5},
    "data": {"seq_length": 32, "curriculum": "curriculum.yaml"},
}
CURRICULUM: dict[str, Any] = {
    "domains": {"en": {"path": "en"}, "zh": {"path": "zh"}, "code": {"path": "code"}},
    "stages": [{"name": "all", "at": 0, "weights": {"en": 1, "zh": 1}}],
}
SIZES = {
    "small": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
    "large": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "lr": 5e-4},
}
BATCH = 4 * 32


def write(folder: Path, base_: Any = BASE, curriculum_: Any = CURRICULUM, **changes: Any) -> Path:
    content = {"base": "base.yaml", "runs": "runs", "sizes": SIZES, "tokens": [100 * BATCH]}
    content = {k: v for k, v in {**content, **changes}.items() if v is not None}
    for name, part in (("base", base_), ("curriculum", curriculum_), ("sweep", content)):
        (folder / f"{name}.yaml").write_text(dump_yaml(part), encoding="utf-8")
    return folder / "sweep.yaml"


def planned(path: Path) -> list[PlannedRun]:
    return [run for group in plan_runs(load_sweep(path)) for run in group]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None
)
@given(
    sizes=st.lists(st.sampled_from(sorted(SIZES)), min_size=1, unique=True),
    iterations=st.lists(st.integers(10, 2000), min_size=1, max_size=5, unique=True),
    shares=st.integers(0, 2),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True),
    cooldown=st.floats(0.05, 0.5),
)
def test_every_cell_is_one_run_and_every_iteration_of_a_trunk_is_trained_once(
    tmp_path: Path,
    sizes: list[str],
    iterations: list[int],
    shares: int,
    seeds: list[int],
    cooldown: float,
) -> None:
    weights = {f"s{i}": {"en": i, "zh": 1} for i in range(shares)}
    path = write(
        tmp_path,
        sizes={name: SIZES[name] for name in sizes},
        tokens=[count * BATCH for count in iterations],
        shares=weights or None,
        seeds=seeds,
        cooldown=cooldown,
    )
    sweep = load_sweep(path)
    groups = plan_runs(sweep)
    runs = [run for group in groups for run in group]
    assert len({run.name for run in runs}) == len(runs)
    results = [run for run in runs if not run.is_leg]
    cells = {(run.size, run.share, run.seed, run.tokens) for run in results}
    assert len(cells) == len(results) == len(sizes) * max(1, shares) * len(seeds) * len(iterations)
    assert {run.tokens for run in results} == {count * BATCH for count in iterations}
    by_name = {run.name: run for run in runs}
    for group in groups:
        legs = [run for run in group if run.is_leg]
        ends = {(r.iterations, r.written.optimizer.lr_wsd_decay_iters) for r in group} - {
            (leg.iterations, None) for leg in legs
        }
        begins = {end - (cooled or 0) for end, cooled in ends}
        assert {leg.iterations for leg in legs} == (begins if len(iterations) > 1 else set())
        # The legs are the trunk, each iteration once, in order.
        assert [leg.first for leg in legs] == [0, *(leg.iterations for leg in legs)][: len(legs)]
        for number, run in enumerate(group):
            assert run.parent is None or run.parent in {before.name for before in group[:number]}
            o, where = run.written.optimizer, run.written.checkpoint
            if run.parent is not None:
                assert by_name[run.parent].iterations == run.first == where.branch_from
                assert where.load == by_name[run.parent].written.checkpoint.save
            if run.is_leg:
                assert o.lr_decay_style == "constant" and not run.written.validation.eval_interval
                continue
            assert o.lr_decay_style == "WSD"
            cooled = o.lr_wsd_decay_iters or 0
            assert abs(cooled - cooldown * run.iterations) <= 1
            assert run.first in (0, run.iterations - cooled)
            assert run.flops(512) == flops_per_token(run.config, 512) * run.own_tokens


def test_runs_continue_from_the_weights_that_the_file_names(tmp_path: Path) -> None:
    tokens = [100 * BATCH, 200 * BATCH]
    runs = planned(write(tmp_path, start="base/{size}-{seed}", tokens=tokens, seeds=[7]))
    for run in runs:
        where, start = run.written.checkpoint, str(tmp_path / "base" / f"{run.size}-7")
        first = run.parent is None
        assert (run.start, where.finetune) == (start if first else None, first)
        assert not first or where.load == start


def test_shares_replace_the_stages_and_keep_the_domains(tmp_path: Path) -> None:
    stages = [{"name": "a", "at": 0, "weights": {"en": 1}}, *CURRICULUM["stages"]]
    stages[1] = stages[1] | {"at": "50%", "name": "b"}
    sweep = load_sweep(
        write(
            tmp_path, curriculum_=CURRICULUM | {"stages": stages}, shares={"x": {"zh": 3, "en": 1}}
        )
    )
    (tmp_path / "x.yaml").write_text(dump_yaml(sweep.curricula["x"]), encoding="utf-8")
    curriculum = load_curriculum(tmp_path / "x.yaml")
    assert {name: domain.path for name, domain in curriculum.domains.items()} == {
        name: str(tmp_path / name) for name in ("en", "zh", "code")
    }
    (stage,) = curriculum.stages
    assert dict(stage.weights) == {"zh": 3, "en": 1}


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(500, "500"), (1000, "1k"), (1_500_000, "1.5M"), (10**9, "1B"), (1_234_567, "1234567"),
     (12_340_000, "12.34M"), (3 * 10**12, "3T")],
)  # fmt: skip
def test_the_name_of_a_length_is_short_and_exact(tokens: int, name: str) -> None:
    assert length_name(tokens) == name


@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_different_lengths_have_different_names(a: int, b: int) -> None:
    assert (length_name(a) == length_name(b)) == (a == b)


RAMPUP = BASE | {"training": BASE["training"] | {"rampup_batch_size": [2, 2, 64]}}
FRACTION = BASE | {"optimizer": {"lr": 1e-3, "lr_warmup_fraction": 0.1}}
PERCENT = CURRICULUM | {
    "stages": [*CURRICULUM["stages"], {"name": "end", "at": "50%", "weights": {"zh": 1}}]
}
TWO = [100 * BATCH, 200 * BATCH]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {}}, "size: unknown key, did you mean 'sizes'?"),
        ({"tokens": None}, "tokens: it is missing; write"),
        ({"tokens": [0]}, "tokens[1]: 0 is not a whole number from 1 up"),
        ({"tokens": [128, 128]}, "has a length twice"),
        ({"tokens": ["1M"]}, "a number is expected, found text '1M'"),
        ({"tokens": [100 * BATCH, 100 * BATCH + 1]}, "are both 100 iterations"),
        ({"tokens": [3 * BATCH]}, "are 3 iterations of 128 tokens, of which 2 are warm-up"),
        ({"cooldown": 1}, "cooldown: 1 is not between 0 and 1"),
        ({"sizes": {"a": {"num_layer": 2}}}, "sizes.a: unknown setting 'num_layer'"),
        ({"sizes": {"a": {"train_iters": 2}}}, "sizes.a.train_iters: it is the same for all"),
        ({"sizes": {"a/b": {}}}, "'a/b' is not a valid name"),
        ({"sizes": {"a": {"num_layers": 2}}}, "sizes.a: hidden_size is"),
        ({"shares": {"x": {"zhh": 1}}}, "shares.x: domain 'zhh' is unknown, did you mean 'zh'?"),
        ({"shares": {"x": {"zh": -1}}}, "shares.x.zh: -1 is negative"),
        ({"shares": [0.5]}, "shares: a mapping is expected, found a list"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] has a seed twice"),
        ({"seeds": [1.5]}, "seeds[1]: 1.5 is not a whole number"),
        ({"target": "ja"}, "target: domain 'ja' is unknown"),
        ({"keep": ["enn"]}, "keep: domain 'enn' is unknown, did you mean 'en'?"),
        ({"base": "none.yaml"}, "none.yaml: cannot be read"),
        ({"base_": RAMPUP}, "rampup_batch_size: lengths are counted in complete batches"),
        ({"base_": FRACTION, "tokens": TWO}, "lr_warmup_fraction 0.1 depends on the length"),
        ({"curriculum_": PERCENT, "tokens": TWO}, "stage 'end' is at a percentage of the run"),
        ({"processes": 0}, "processes: 0 is not a whole number from 1 up"),
        ({"base_": {"data": {"seq_length": 32}}}, "curriculum: neither the sweep nor its base"),
    ],
)
def test_a_wrong_file_is_one_message_with_key_and_what_to_do(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        plan_runs(load_sweep(path))
    assert message in str(caught.value) and ";" in str(caught.value)


def test_one_length_may_have_stages_at_percentages(tmp_path: Path) -> None:
    assert len(planned(write(tmp_path, curriculum_=PERCENT))) == 2


def test_all_sizes_with_errors_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, sizes={"a": {"num_layers": 2}, "b": {"hidden_size": 32}})
    with pytest.raises(ConfigError) as caught:
        planned(path)
    assert "sizes.a: " in str(caught.value) and "sizes.b: " in str(caught.value)
