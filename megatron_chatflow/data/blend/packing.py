"""Which conversations share a window: best fit, longest first, on a histogram of lengths.

All conversations of one length are alike to the packer, and so are all windows with the same
content; so it moves groups of windows ("4,000 windows that hold one of 1,500 and two of 200")
instead of single conversations. The number of steps depends on how many different lengths there
are, not on how many conversations (the idea of "histogram packing", Krell et al.,
arXiv:2107.02027). The result is a function of (lengths, seq_length) alone.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packing:
    """Conversations in windows.

    Attributes:
        order: conversation numbers, window after window, int32 or int64 [packed conversations].
        starts: where in `order` each window starts, and the end, int64 [windows + 1].
        num_cut: conversations longer than a window, of which only the first seq_length + 1 tokens
            are read.
        num_skipped: conversations given as fewer than two tokens long, which have no label and are
            left out.
    """

    order: np.ndarray
    starts: np.ndarray
    num_cut: int
    num_skipped: int

    @property
    def num_windows(self) -> int:
        """Number of windows."""
        return len(self.starts) - 1


def positions(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Return the positions that conversations of `lengths` tokens take.

    That is one fewer (the last token is only a label), at most S.
    """
    return np.clip(lengths.astype(np.int64) - 1, 0, seq_length)


def pack(lengths: np.ndarray, seq_length: int) -> Packing:
    """Pack conversations into windows of `seq_length` positions, none split over two windows.

    Args:
        lengths: tokens of each conversation, integers [n].
        seq_length: positions in a window.

    Returns:
        The packing. Time is that of sorting n numbers, plus a term that depends on the number of
        different lengths.
    """
    # Conversations by size, longest first: int32 or int64 [n]; those without a label are dropped.
    sizes = positions(lengths, seq_length)
    room = (seq_length - sizes).astype(np.uint16 if seq_length < 2**16 else np.int64)
    by_size = np.argsort(room, kind="stable")  # with 16 bits a radix sort
    by_size = by_size.astype(np.int32 if len(sizes) < 2**31 else np.int64)
    num_skipped = int(np.count_nonzero(sizes == 0))
    by_size = by_size[: len(sizes) - num_skipped]
    # Windows are filled on the histogram of sizes [S + 1] alone, then given their conversations.
    order, starts = _lay_out(
        _group(np.bincount(sizes, minlength=seq_length + 1), seq_length), by_size
    )
    return Packing(order, starts, int(np.count_nonzero(lengths > seq_length + 1)), num_skipped)


@dataclasses.dataclass
class _Group:
    """Several windows alike.

    Each holds, for every entry (first, per_window) of `content`, `per_window` conversations from
    `by_size[first:]` on.
    """

    windows: int
    content: list[tuple[int, int]]


def _group(histogram: np.ndarray, seq_length: int) -> list[_Group]:
    """Group conversations by best fit, longest first; the groups hold the entire histogram.

    `open_groups[room]` holds the groups with that many positions left; `occupied` has bit `room`
    set where there are any, so the smallest room that still fits is the lowest bit above.
    """
    open_groups: dict[int, list[_Group]] = {}
    occupied = 0

    def put(group: _Group, room: int) -> None:
        nonlocal occupied
        open_groups.setdefault(room, []).append(group)
        occupied |= 1 << room

    first = 0
    for size in (np.flatnonzero(histogram[1:]) + 1)[::-1].tolist():
        left = int(histogram[size])
        while left:
            above = occupied >> size
            if not above:
                # No open window has room: new ones, with as many of this size as fit in each.
                each = min(seq_length // size, left)
                windows = left // each
                put(_Group(windows, [(first, each)]), seq_length - size * each)
            else:
                # The tightest group that still fits; what it does not need of it stays open.
                room = size + (above & -above).bit_length() - 1
                group = open_groups[room].pop()
                if not open_groups[room]:
                    occupied ^= 1 << room
                each = min(room // size, left)
                windows = min(group.windows, left // each)
                if windows < group.windows:
                    put(
                        _Group(
                            group.windows - windows,
                            [(start + windows * n, n) for start, n in group.content],
                        ),
                        room,
                    )
                put(_Group(windows, group.content + [(first, each)]), room - size * each)
            first += windows * each
            left -= windows * each
    return [group for room in sorted(open_groups) for group in open_groups[room]]


def _lay_out(groups: list[_Group], by_size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `order` and `starts` of the packing: each group's conversations, window by window."""
    order = np.empty(len(by_size), by_size.dtype)
    counts = []
    at = 0
    for group in groups:
        width = sum(n for _, n in group.content)
        # [windows, conversations per window]: each entry of the content fills some columns.
        block = order[at : at + group.windows * width].reshape(group.windows, width)
        column = 0
        for first, n in group.content:
            block[:, column : column + n] = by_size[first : first + group.windows * n].reshape(
                group.windows, n
            )
            column += n
        counts.append(np.full(group.windows, width))
        at += group.windows * width
    return order, np.concatenate([[0], np.cumsum(np.concatenate(counts))]) if counts else np.zeros(
        1, np.int64
    )
