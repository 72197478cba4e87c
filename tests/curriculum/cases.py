"""Curricula for the tests of `curriculum/`, and what they mean, computed from the definitions
alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_chatflow.curriculum import BlendPlan, Curriculum, parse_curriculum

GOOD = """
clock: samples              # samples | iterations | tokens: the unit of `at`
domains:
  en:       {path: data/en_text_document}
  zh:       {path: data/zh_text_document, max_epochs: 4}
  en-zh:    {path: data/enzh_text_document}
  instruct: {path: data/instruct_document, kind: instruct}
stages:                     # the share vector at each knot; between knots it moves by the ramp
  - {name: english,   at: 0,   weights: {en: 0.7, en-zh: 0.3}}
  - {name: bilingual, at: 40%, weights: {en: 0.3, zh: 0.5, en-zh: 0.2}, ramp: root2}
  - {name: instruct,  at: 90%, weights: {en: 0.1, zh: 0.3, instruct: 0.6}, ramp: linear}
on_exhausted: repeat        # repeat | redistribute | stop | error
"""
"""The example of docs/curriculum.md."""

RAMPS = ("step", "linear", "cosine", "root2", "root3.5", "root0.5", "geometric")


def quick(examples: int) -> settings:
    """Settings that find the same cases every time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def make_curriculum(
    stages: list[dict[str, Any]], names: list[str] | None = None, **top: Any
) -> Curriculum:
    """A curriculum of text domains: those in `names`, or those that a stage weights. `top`: clock,
    on_exhausted, and max_epochs by name.
    """
    names = names or list({name: None for stage in stages for name in stage["weights"]})
    caps = top.pop("max_epochs", {})
    domains = {
        name: {"path": name, **({"max_epochs": caps[name]} if name in caps else {})}
        for name in names
    }
    stages = [{"name": f"stage{i}", **stage} for i, stage in enumerate(stages)]
    return parse_curriculum(
        {"domains": domains, "stages": stages, **top}, source="test.yaml", folder="/corpora"
    )


def make_plan(
    stages: list[dict[str, Any]],
    num_samples: int,
    *,
    capacities: dict[str, int] | None = None,
    **top: Any,
) -> BlendPlan:
    return BlendPlan(
        make_curriculum(stages, **top),
        num_samples=num_samples,
        global_batch_size=8,
        seq_length=16,
        capacities=capacities,
    )


def named(values: Any) -> dict[str, float]:
    """Weights of domains d000, d001, ..."""
    return {f"d{i:03d}": float(value) for i, value in enumerate(values)}


@st.composite
def weights(draw: st.DrawFn, size: int) -> np.ndarray:
    """Positive and zero weights of every kind that is hard on a blend: equal, large among tiny,
    halving, zeros, anything.
    """
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    kind = draw(
        st.sampled_from(("any", "equal", "large", "halving", "zeros", "skewed", "clashing"))
    )
    values = rng.random(size) + 1e-6
    if kind == "equal":
        values[:] = 1
    elif kind == "large":
        values[rng.integers(size)] = size * draw(st.sampled_from((1, 10, 1000)))
    elif kind == "halving":
        values = rng.permutation(0.5 ** np.arange(size) + 1e-30)
    elif kind == "zeros":
        values *= rng.random(size) < 0.4
        values[rng.integers(size)] = 1
    elif kind == "skewed":
        values = rng.dirichlet(np.full(size, 0.1)) + 1e-15
    elif kind == "clashing":
        values = (np.arange(size) % 3 + 0.5) / draw(st.integers(100, 1500))
        values[rng.integers(size)] = max(1 - values.sum(), 0.01)
    return values


@st.composite
def stage_lists(
    draw: st.DrawFn,
    num_samples: int,
    sizes: tuple[int, ...] = (1, 2, 3, 4, 7, 16, 33, 128),
    most: int = 5,
) -> list[dict[str, Any]]:
    """Stages at absolute samples, the first at 0; the last may lie beyond the run. A few of them,
    or many (`most` of them, from a few kinds).
    """
    size = draw(st.sampled_from(sizes))
    end = num_samples + num_samples // 4
    if most > 5 and draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 10_000)))
        places, kinds = (
            np.unique(rng.integers(1, end, most)).tolist(),
            [draw(weights(size)) for _ in range(4)],
        )
        vectors = [rng.permutation(kinds[rng.integers(4)]) for _ in range(len(places) + 1)]
        ramps = rng.choice(RAMPS, len(places) + 1).tolist()
        return [
            {"at": at, "weights": named(v), "ramp": ramp}
            for at, v, ramp in zip([0, *places], vectors, ramps, strict=True)
        ]
    places = sorted(draw(st.sets(st.integers(1, end), max_size=min(most, 5) - 1)))
    return [
        {"at": at, "weights": named(draw(weights(size))), "ramp": draw(st.sampled_from(RAMPS))}
        for at in [0, *places]
    ]


def ramp_value(ramp: str, s: np.ndarray) -> np.ndarray:
    """The ramps as the documentation defines them; s from 0 to 1."""
    if ramp == "step":
        return np.zeros_like(s)
    if ramp == "linear":
        return s
    if ramp == "cosine":
        return (1 - np.cos(math.pi * s)) / 2
    if ramp == "geometric":
        return (2.0 ** ((1 - s) * math.log2(1 / 128)) - 1 / 128) / (1 - 1 / 128)
    return s ** (1 / float(ramp.removeprefix("root")))


def share_at(stages: list[dict[str, Any]], names: list[str], times: np.ndarray) -> np.ndarray:
    """Shares at these times by the definition: [len(times), K]."""
    vectors = np.array(
        [[stage["weights"].get(name, 0.0) for name in names] for stage in stages], float
    )
    vectors /= vectors.sum(1, keepdims=True)
    shares = np.empty((len(times), len(names)))
    for i, stage in enumerate(stages):
        rows = times >= stage["at"]
        shares[rows] = vectors[i]
        if i + 1 < len(stages):
            after = stages[i + 1]
            rows &= times < after["at"]
            p = ramp_value(
                after.get("ramp", "linear"),
                (times[rows] - stage["at"]) / (after["at"] - stage["at"]),
            )[:, None]
            shares[rows] = (1 - p) * vectors[i] + p * vectors[i + 1]
    return shares


def integrals(
    stages: list[dict[str, Any]], names: list[str], stop: int, steps: int = 4
) -> np.ndarray:
    """The integral of the shares from 0 to 0, 1, ..., stop, by the midpoint rule with N steps
    a sample: [stop + 1, K].
    """
    times = (np.arange(stop * steps) + 0.5) / steps
    each = share_at(stages, names, times).reshape(stop, steps, -1).mean(1)
    return np.vstack([np.zeros(len(names)), np.cumsum(each, 0)])


def running_counts(domains: np.ndarray, size: int) -> np.ndarray:
    """How many of the first 0, 1, ..., n samples each domain got: [n + 1, K]."""
    hits = np.zeros((len(domains) + 1, size), np.int64)
    hits[np.arange(len(domains)) + 1, domains] = 1
    return hits.cumsum(0)


def assert_counted_up(domains: np.ndarray, ordinals: np.ndarray, given: np.ndarray) -> None:
    """Each domain's ordinals continue from `given`, one by one."""
    order = np.argsort(domains, kind="stable")
    found = np.bincount(domains, minlength=len(given))
    first = np.repeat(given - (np.cumsum(found) - found), found)
    assert np.array_equal(ordinals[order], np.arange(len(order)) + first)


def worst_window(
    errors: np.ndarray, lengths: tuple[int, ...] = (64, 65, 97, 128, 200, 500)
) -> float:
    """The largest change of the error over windows of these lengths: errors are [n + 1, K]."""
    return max(
        (float(np.abs(errors[w:] - errors[:-w]).max()) for w in lengths if w < len(errors)),
        default=0.0,
    )
