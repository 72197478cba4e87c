"""Tables of runs of known laws, for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_chatflow.planner.laws.forms import Form, basis_of
from megatron_chatflow.planner.laws.run_table import RunRecord

SIZES = np.geomspace(5e7, 5e9, 5)
LENGTHS = np.geomspace(1e9, 1e11, 4)
PLAIN_LAW = {"E": 1.82, "A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366}
EXTENDED_LAW = {**PLAIN_LAW, "gamma": 0.05}
JOINT_LAW = {**PLAIN_LAW, "B'": 600.0, "beta'": 0.31, "gamma": 0.03}


def grid(
    sizes: Sequence[float] | np.ndarray = SIZES,
    lengths: Sequence[float] | np.ndarray = LENGTHS,
    kinds: Sequence[str] = ("scratch",),
) -> list[RunRecord]:
    """Return runs of every size, length and kind, without losses."""
    return [
        RunRecord(f"{kind} {i}x{j}", round(n), round(d), None, kind=kind)
        for kind in kinds
        for i, n in enumerate(sizes)
        for j, d in enumerate(lengths)
    ]


def measured(
    form: Form,
    constants: Mapping[str, float],
    runs: Sequence[RunRecord],
    noise: float = 0.0,
    seed: int = 0,
) -> list[RunRecord]:
    """Return the runs with losses of a law, times log-normal noise."""
    basis = basis_of(form, runs)
    losses = basis.loss(basis.theta(constants))
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal(len(runs)))
    return [replace(r, loss=float(x)) for r, x in zip(runs, losses * factors, strict=True)]
