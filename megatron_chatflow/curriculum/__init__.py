"""The shares of the domains over a run, and which sample of which domain is sample n.

Imports numpy only. See README.md.
"""

from megatron_chatflow.curriculum.forecast import (
    DomainForecast,
    RunForecast,
    StageForecast,
    capacities,
    check_exhaustion,
    forecast,
    share_curve,
)
from megatron_chatflow.curriculum.ledger import PLAN_VERSION
from megatron_chatflow.curriculum.parser import (
    constant_curriculum,
    load_curriculum,
    parse_curriculum,
)
from megatron_chatflow.curriculum.plan import BlendPlan
from megatron_chatflow.curriculum.presets import keep_expansion, preset_lines
from megatron_chatflow.curriculum.schema import Curriculum, Domain, Preset, Stage

__all__ = [
    "PLAN_VERSION",
    "BlendPlan",
    "Curriculum",
    "Domain",
    "DomainForecast",
    "Preset",
    "RunForecast",
    "Stage",
    "StageForecast",
    "capacities",
    "check_exhaustion",
    "constant_curriculum",
    "forecast",
    "keep_expansion",
    "load_curriculum",
    "parse_curriculum",
    "preset_lines",
    "share_curve",
]
