"""Delayed scaling: a tensor's scale comes from its largest magnitudes in earlier iterations.

Source of the rule: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), as Transformer
Engine carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_chatflow.fp8.formats import FLOAT32_MAX, Format, absolute_max
from megatron_chatflow.fp8.quantize import Scaled, with_scale

FORWARD_SLOTS = {"input": 0, "weight": 1}
BACKWARD_SLOTS = {"grad_output": 0}
FORWARD_WIDTH, BACKWARD_WIDTH = 3, 2
"""Columns that one linear layer has in each direction. Those of its output and of its input's
gradient stay empty: they are not FP8.
"""


def update(
    history: torch.Tensor,
    scale: torch.Tensor,
    current: torch.Tensor,
    largest: float,
    *,
    margin: int,
    algo: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (history, scale) after a pass.

    Args:
        history: [length, n] magnitudes; row 0 is of the running pass, rows 1 to length - 1 of
            earlier ones, oldest first.
        scale: [n] factors in use.
        current: [n] magnitudes of this pass over all processes; 0 for a tensor that did not occur,
            which changes nothing for it.
        largest: Largest value of the format.
        margin: The scale leaves 2^margin of headroom.
        algo: `max` of the window or `most_recent`.
    """
    seen = current != 0
    # window [length, n]: the magnitudes that count, this pass last.
    window = torch.cat([history[1:], current[None]])
    amax = window.amax(0) if algo == "max" else current
    # moved [length, n]: the history of the next pass, with an empty row 0 for it.
    moved = torch.cat([torch.zeros_like(current)[None], window[1:]])
    # wanted [n] = largest / 2^margin / amax.
    wanted = torch.div(torch.full_like(amax, largest * 2.0**-margin), amax).clamp(max=FLOAT32_MAX)
    usable = seen & torch.isfinite(amax) & (amax > 0)
    return torch.where(seen, moved, history), torch.where(usable, wanted, scale)


@dataclass
class Track:
    """Histories and scales of this rank's FP8 tensors in one direction, forward or backward."""

    form: Format
    length: int
    history: torch.Tensor = field(init=False)
    scale: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin without tensors."""
        self.history, self.scale = torch.zeros(self.length, 0), torch.ones(0)

    def add(self, columns: int) -> int:
        """Make room for `columns` tensors; return the first one's column."""
        first = self.scale.numel()
        self.history = torch.cat([self.history, torch.zeros(self.length, columns)], 1)
        self.scale = torch.cat([self.scale, torch.ones(columns)])
        return first

    def quantize(self, matrix: torch.Tensor, column: int, *, record: bool) -> Scaled:
        """Return `matrix` in FP8 under the present scale.

        Its own magnitude counts from the next pass on, if it is recorded.
        """
        if record:
            self.history[0, column] = torch.maximum(self.history[0, column], absolute_max(matrix))
        return with_scale(matrix, self.form, self.scale[column])


class DelayedScaling:
    """The delayed scaling of one rank.

    All its layers are updated together, with one collective per pass.
    """

    def __init__(
        self,
        forms: tuple[Format, Format],
        *,
        length: int,
        algo: str,
        margin: int,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        """Begin without tensors; see `update` for `algo` and `margin`.

        Args:
            forms: The formats of the forward and the backward pass.
            length: Rows of the histories.
            algo: How a magnitude follows from a history.
            margin: Headroom of the scales.
            group: The ranks over which magnitudes are maximized.
        """
        self.forward, self.backward = Track(forms[0], length), Track(forms[1], length)
        self._algo, self._margin, self._group = algo, margin, group

    def update(self, track: Track) -> None:
        """End a pass: maximize magnitudes over the group, shift histories, update scales."""
        current = track.history[0].clone()
        if self._group.size() > 1:
            torch.distributed.all_reduce(current, torch.distributed.ReduceOp.MAX, group=self._group)
        track.history, track.scale = update(
            track.history,
            track.scale,
            current,
            track.form.max,
            margin=self._margin,
            algo=self._algo,
        )
