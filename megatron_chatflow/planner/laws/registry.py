"""The forms that `chatflow fit --form` knows, and what is asked of a fit.

Imports no numpy, because the command line reads the names for its help. Another law is one entry: a
function from the runs of one held-out language to the report of its fit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_chatflow.planner.laws.run_table import RunRecord

Report = dict[str, Any]
"""Plain values, as JSON has them. A report has at least ``form``, ``formula``, ``metric``, ``runs``
and ``constants`` ({name: {"estimate", "low", "high"}}); `report.law_table` prints the parts that it
knows, and ``lines`` (texts) unchanged.
"""


@dataclass(frozen=True)
class FitSettings:
    """What is asked of a fit, beyond the form."""

    metric: str = "loss"
    """``loss`` or ``bits_per_byte``."""
    huber: float | None = None
    """Delta of Huber's function of the residuals; None for least squares."""
    draws: int = 200
    """Refits of the bootstrap; 0 for none."""
    resample: str = "residuals"
    """``residuals`` or ``runs``."""
    seed: int = 0
    """Of the bootstrap."""
    budgets: tuple[float, ...] = ()
    """Floating-point operations to allocate; empty for the largest run's, and ten times that."""
    sizes: tuple[int, ...] = ()
    """Parameters of models that are given, to which budgets are applied too."""
    predictions: tuple[tuple[int, int], ...] = ()
    """(parameters, tokens) of which to predict the loss."""
    candidates: tuple[RunRecord, ...] = ()
    """Runs that could be added; empty for a grid around the runs."""
    proposals: int = 3
    """How many of them to propose."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What the report repeats of the input, e.g. the definition of N."""


@dataclass(frozen=True)
class FitForm:
    """An entry of `FORMS`."""

    what: str
    """One line for the help."""
    function: str
    """``module:function`` in this package; the function takes (name, runs, settings)."""

    def load(self) -> Callable[[str, Sequence[RunRecord], FitSettings], Report]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)


_POWERS = "analysis:analyze"
FORMS: Mapping[str, FitForm] = {
    "auto": FitForm("joint where both kinds of runs exist, else plain or extended", _POWERS),
    "plain": FitForm("E + A/N^alpha + B/D^beta", _POWERS),
    "extended": FitForm("E + A/N^alpha + B/(D^beta N^gamma)", _POWERS),
    "joint": FitForm("scratch plain and continued extended, E, A and alpha shared", _POWERS),
    "frozen": FitForm("as joint, with the constants from scratch fixed first", _POWERS),
    "mixture": FitForm("an exponential of the shares of many domains", "fit_shares:analyze"),
    "dcpt": FitForm("size, length and the share of the language", "fit_shares:analyze"),
}
"""{name: form} in the order of the help."""
