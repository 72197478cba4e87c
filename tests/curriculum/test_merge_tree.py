"""The order within a piece, against a slow construction of it with exact fractions."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.curriculum.merge_tree import MergeTree, _pair
from megatron_chatflow.curriculum.ramps import CONSTANT, pacing
from tests.curriculum.cases import quick, weights


def slowly(
    tree: MergeTree, shares: list[Fraction], owed: list[Fraction], length: int
) -> list[tuple[int, int]]:
    """(domain, ordinal) of the first samples: every node's entire sequence, merged from its
    children's by exact due times.
    """
    share, behind, members = (
        dict(enumerate(shares)),
        dict(enumerate(owed)),
        dict.fromkeys(range(len(owed)), 1),
    )
    sequence = {leaf: [(leaf, j) for j in range(length)] for leaf in share}
    makes_up_for = dict(behind)
    for node in range(tree.size, tree.root + 1):
        children = [int(tree.left[node]), int(tree.right[node])]
        share[node], behind[node], members[node] = (
            sum(part[child] for child in children) for part in (share, behind, members)
        )
        size = abs(behind[node])
        size = max(size - Fraction(members[node] - 1, 4), min(size, Fraction(1, 2)))
        makes_up_for[node] = size if behind[node] > 0 else -size
        due = [
            ((j + Fraction(1, 2) - makes_up_for[child]) / share[child], side, j)
            for side, child in enumerate(children)
            for j in range(length)
        ]
        sequence[node] = [sequence[children[side]][j] for _, side, j in sorted(due)[:length]]
    return sequence[tree.root]


@quick(60)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=9), st.data())
def test_constant_shares_follow_exact_due_times(parts, data):
    parts[0] += 128 - sum(parts)
    owed = data.draw(st.lists(st.integers(-12, 12), min_size=len(parts), max_size=len(parts)))
    owed[0] -= sum(owed)
    shares = np.array(parts) / 128
    tree = MergeTree(shares, shares, CONSTANT, 0, np.array(owed) / 4)
    expected = slowly(tree, [Fraction(p, 128) for p in parts], [Fraction(o, 4) for o in owed], 150)
    assert list(zip(*map(np.ndarray.tolist, tree.locate(0, 150)), strict=True)) == expected
    counted = [
        np.bincount([domain for domain, _ in expected[:n]], minlength=len(parts)).tolist()
        for n in (0, 1, 77, 150)
    ]
    assert [tree.counts(n).tolist() for n in (0, 1, 77, 150)] == counted


@quick(40)
@given(
    weights(12),
    weights(12),
    st.sampled_from(("linear", "cosine", "root2", "geometric")),
    st.integers(1, 10**9),
)
def test_due_times_are_where_the_integral_reaches_them(before, after, ramp, width):
    before, after = before / before.sum(), after / after.sum()
    live = before + after > 0
    before, after, pace = before[live], after[live], pacing(ramp, width)
    tree = MergeTree(before, after, pace, 0, np.zeros(len(before)))
    x = np.linspace(0, width, 50)
    for node in range(tree.root + 1):
        reached = tree.before[node] * x + tree.rise[node] * pace.area(x)
        again = tree.before[node] * (t := tree._due(np.full(50, node), reached - 0.5)) + tree.rise[
            node
        ] * pace.area(t)
        assert np.abs(again - reached).max() < 1e-5


@quick(40)
@given(st.integers(1, 128).flatmap(weights))
def test_the_tree_has_every_leaf_once_and_is_hardly_deeper_than_a_full_one(values):
    left, right = _pair(values)
    assert sorted([*left[len(values) :], *right[len(values) :]]) == list(range(len(left) - 1))
    depth = np.zeros(len(left), int)
    for node in range(len(left) - 1, len(values) - 1, -1):
        depth[left[node]] = depth[right[node]] = depth[node] + 1
    assert depth.max() <= max(len(values) - 1, 1).bit_length() + 1
