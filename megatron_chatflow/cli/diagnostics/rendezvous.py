"""Connect all processes of the job, add a number over them, and compare what they have."""

from __future__ import annotations

import time
from collections.abc import Mapping

from megatron_chatflow.cli.diagnostics import Row
from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.distributed.launch import Launch

TIMEOUT_MINUTES = 2


def meeting(launch: Launch, facts: Mapping[str, str], init_timeout: int) -> list[Row]:
    """Make the process groups of a run, add a number over all processes, and compare `facts`.

    Called by every process. They have `init_timeout` seconds to connect.
    """
    import torch

    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.consistency_check import differences, gather_facts

    begin = time.perf_counter()
    try:
        process_groups.initialize(
            launch,
            ParallelSettings(
                distributed_timeout_minutes=TIMEOUT_MINUTES, init_timeout=init_timeout
            ),
            1,
        )
        total = torch.ones(1, device=process_groups.device(launch.local_rank))
        torch.distributed.all_reduce(total)
        gathered = gather_facts(facts)
    # Backends raise many classes when the network, the driver or a peer fails.
    except Exception as error:
        return [
            Row(
                "meeting",
                "failed",
                f"rank {launch.rank}: {' '.join(str(error).split())}",
                wrong=True,
            )
        ]
    finally:
        process_groups.shut_down()
    count, hosts = int(total.item()), len({host for host, _ in gathered})
    reason = (
        f"{hosts} host{'s' * (hosts > 1)}, "
        f"{torch.distributed.Backend.NCCL if total.is_cuda else torch.distributed.Backend.GLOO}"
    )
    rows = [
        Row(
            "meeting",
            f"{count} of {launch.world_size}",
            f"{reason}, {time.perf_counter() - begin:.1f} s",
            wrong=count != launch.world_size,
        )
    ]
    return rows + [
        Row(f"  {name}", "differs", values, wrong=True)
        for name, values in differences(gathered).items()
    ]
