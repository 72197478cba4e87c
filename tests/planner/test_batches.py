"""Chunks in flight and idle time of each stage, against simulated schedules."""

from __future__ import annotations

import pytest

from megatron_chatflow.planner.batches import bubble, chunks_in_flight
from megatron_chatflow.planner.parameters import Layout

FORWARD, BACKWARD = 1, 2


def orders(layout: Layout, count: int) -> list[list[tuple[bool, int, int]]]:
    """(forward?, chunk, micro-batch) in the order in which each stage runs them: warm-up, one
    forward one backward, cool-down.
    """
    total, pp, vpp = count * layout.vpp, layout.pp, layout.vpp

    def place(k: int, forward: bool) -> tuple[bool, int, int]:
        chunk = k // pp % vpp
        return forward, chunk if forward else vpp - 1 - chunk, k // (pp * vpp) * pp + k % pp

    result = []
    for stage in range(pp):
        ahead = min(total, pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp)
        order = [place(k, True) for k in range(ahead)]
        for k in range(total - ahead):
            order += [place(ahead + k, True), place(k, False)]
        result.append(order + [place(k, False) for k in range(total - ahead, total)])
    return result


def play(layout: Layout, count: int) -> tuple[float, list[int]]:
    """Return (time of the schedule, most chunks in flight on each stage).

    The unit of time is one chunk's forward pass.
    """
    done: dict[tuple[bool, int, int, int], float] = {}
    queues, clocks = orders(layout, count), [0.0] * layout.pp
    flying, most = [0] * layout.pp, [0] * layout.pp
    last = layout.pp - 1
    while any(queues):
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                forward, chunk, batch = queue[0]
                if forward:
                    before = (
                        (True, chunk, batch, stage - 1)
                        if stage
                        else (True, chunk - 1, batch, last)
                        if chunk
                        else None
                    )
                elif stage < last:
                    before = (False, chunk, batch, stage + 1)
                else:
                    before = (
                        (False, chunk + 1, batch, 0)
                        if chunk < layout.vpp - 1
                        else (True, chunk, batch, stage)
                    )
                if before is not None and before not in done:
                    break
                queue.pop(0)
                clocks[stage] = max(clocks[stage], done[before] if before else 0.0) + (
                    FORWARD if forward else BACKWARD
                )
                done[forward, chunk, batch, stage] = clocks[stage]
                flying[stage] += 1 if forward else -1
                most[stage] = max(most[stage], flying[stage])
                moved = True
        assert moved, "the schedule hangs"
    return max(clocks), most


@pytest.mark.parametrize(
    ("pp", "vpp"), [(1, 1), *((pp, vpp) for pp in (2, 3, 4, 8) for vpp in (1, 2, 3))]
)
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_a_schedule_played_through_has_the_bubble_and_the_chunks_in_flight(
    pp: int, vpp: int, rounds: int
) -> None:
    layout, count = Layout(1, pp, vpp, 1), pp * rounds
    time, most = play(layout, count)
    assert most == [chunks_in_flight(layout, stage, count) for stage in range(pp)]
    computing = count * vpp * (FORWARD + BACKWARD)
    assert time / computing - 1 == pytest.approx(bubble(layout, count))


def test_fewer_micro_batches_than_stages_are_all_in_flight() -> None:
    assert [chunks_in_flight(Layout(1, 8, 1, 1), stage, 3) for stage in range(8)] == [
        3,
        3,
        3,
        3,
        3,
        3,
        2,
        1,
    ]


def test_the_first_stage_of_an_interleaved_pipeline_holds_the_layers_of_korthikanti() -> None:
    pp, vpp, layers = 8, 4, 96
    held = chunks_in_flight(Layout(1, pp, vpp, 1), 0, 64) * layers / (pp * vpp)
    assert held == pytest.approx(layers * (1 + (pp - 1) / (pp * vpp)))
