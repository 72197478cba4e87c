"""The ledger and the file: which plan a resumed run follows. Imports no torch."""

from __future__ import annotations

from typing import Any

from megatron_chatflow.config import Config, UsageError
from megatron_chatflow.curriculum import BlendPlan


def resume_plan(saved: str, wanted: BlendPlan, consumed: int, *, amend: bool) -> BlendPlan:
    """The plan to go on with after `consumed` samples.

    Args:
        saved: the ledger of the checkpoint (`BlendPlan.to_json`).
        wanted: the plan that the curriculum file and the run's settings tell now.
        consumed: samples already trained on.
        amend: whether the user allows the file to tell another past (--amend-curriculum).

    Raises:
        UsageError: the file tells another past and `amend` is off; names the first sample that differs and both cures.
    """
    ledger = BlendPlan.from_json(saved)
    if ledger.seq_length != wanted.seq_length:
        raise UsageError(
            f"seq_length is {wanted.seq_length} here and {ledger.seq_length} in the checkpoint, so its samples are other tokens; use "
            f"--seq-length {ledger.seq_length}, or --finetune to start afresh"
        )
    candidate = ledger.follow(wanted)
    first = ledger.first_difference(candidate, consumed)
    if first is None:
        return candidate
    if amend:
        return ledger.amend_with(at=consumed, plan=wanted)
    raise UsageError(
        f"the curriculum tells another past than the checkpoint's ledger, first at sample {first} of the {consumed} already trained on; "
        "restore the file, or add --amend-curriculum to keep the past as it was and follow the file from here on"
    )


def data_identity(config: Config, domains: Any) -> dict[str, Any]:
    """What fixes the tokens behind every (domain, ordinal): saved with a checkpoint, compared on resume."""
    data = config.data
    return {
        "seed": config.training.seed,
        "split": data.split,
        "corpora": {name: domain.dataset.fingerprint() for name, domain in domains.items()},
    }


def check_identity(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a resume that would read other tokens under the same ordinals. Domains that are new or gone are no matter."""
    for key, flag in (("seed", "--seed"), ("split", "--split")):
        if saved[key] != now[key]:
            raise UsageError(
                f"{key} is {now[key]} here and {saved[key]} in the checkpoint, which would read samples twice; use "
                f"{flag} {saved[key]}, or --finetune to start afresh"
            )
    for name, fingerprint in now["corpora"].items():
        if saved["corpora"].get(name, fingerprint) != fingerprint:
            raise UsageError(
                f"domain {name}: its corpus is not the one the checkpoint was trained on; restore the files, give the new "
                "corpus a name of its own, or --finetune to start afresh"
            )
