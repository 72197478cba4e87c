"""Whether all processes of a job are about to run the same thing.

Each node reads its own disks, and nothing else reports a stale copy on one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

from megatron_chatflow.distributed.launch import node_name
from megatron_chatflow.errors import ConfigError


def require_agreement(facts: Mapping[str, str]) -> None:
    """Raise ConfigError on every process where a fact differs between them; called by all."""
    found = [f"{name} is {who}" for name, who in differences(gather_facts(facts)).items()]
    if found:
        raise ConfigError(
            f"the processes would not run the same: {', and '.join(found)}; give all nodes "
            f"the same files"
        )


def on_first_rank(work: Callable[[], None], *expected: type[Exception]) -> None:
    """Call `work` on rank 0, and raise its error of a type in `expected` on every rank.

    Called by all.
    """
    answer: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except expected as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is not None:
        raise answer[0]


def gather_facts(facts: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """(node, facts) of every process, in order of rank; called by all of them."""
    gathered: list[tuple[str, dict[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(gathered, (node_name(), dict(facts)))
    return gathered


def differences(gathered: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """{fact: who has what}, for those facts that are not the same everywhere.

    Args:
        gathered: (node, facts) in order of rank. A fact that some do not have counts as another
        value.
    """
    found = {}
    for name in sorted({name for _, facts in gathered for name in facts}):
        holders: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(gathered):
            holders.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            found[name] = "; ".join(
                f"{value} on {_places(ranks, gathered)}" for value, ranks in holders.items()
            )
    return found


def _places(ranks: Sequence[int], gathered: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """``n1, n2 (ranks 0, 1, 2 and 5 more)``."""
    hosts = list(dict.fromkeys(gathered[rank][0] for rank in ranks))
    some = ", ".join(map(str, ranks[:3])) + (
        f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    )
    return (
        f"{', '.join(hosts[:3])}{f' and {len(hosts) - 3} more' if len(hosts) > 3 else ''} "
        f"(rank{'s' * (len(ranks) > 1)} {some})"
    )
