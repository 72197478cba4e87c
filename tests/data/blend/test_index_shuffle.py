"""The shuffle that is computed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.data import domain_key, permutation
from megatron_chatflow.data.blend.index_shuffle import ROUNDS, shuffled_windows

SEEDS = st.integers(-(2**70), 2**70)


@given(st.integers(1, 5000), SEEDS, st.text(max_size=5), st.integers(0, 10**12))
@settings(max_examples=100)
def test_it_is_a_bijection(n, seed, name, epoch):
    assert np.array_equal(
        np.sort(permutation(np.arange(n), n, domain_key(seed, name, epoch))), np.arange(n)
    )


def test_it_is_a_bijection_of_every_small_set():
    for n in range(1, 400):
        assert np.array_equal(
            np.sort(permutation(np.arange(n), n, domain_key(0, "en", n))), np.arange(n)
        )


@given(st.integers(1, 2**62), SEEDS, st.data())
@settings(max_examples=60)
def test_elements_of_a_huge_set_stay_inside_and_apart(n, seed, data):
    start = data.draw(st.integers(0, n - 1))
    index = np.arange(start, min(n, start + 2000))
    image = permutation(index, n, domain_key(seed, "en", 0))
    assert image.min() >= 0 and image.max() < n and len(np.unique(image)) == len(index)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**13), st.integers(0, 2**62), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_elements_of_different_sets_and_keys_go_where_they_go_alone(triples):
    n = np.array([size for size, _, _ in triples])
    index = np.array([i % size for size, i, _ in triples])
    keys = np.stack([domain_key(1, "en", epoch) for _, _, epoch in triples], axis=1)
    together = permutation(index, n, keys)
    alone = [permutation(index[i : i + 1], int(n[i]), keys[:, i])[0] for i in range(len(n))]
    assert together.tolist() == alone


def test_it_changes_with_seed_name_and_epoch():
    orders = {
        tuple(permutation(np.arange(50), 50, domain_key(*key)))
        for key in [(1, "en", 0), (2, "en", 0), (1, "zh", 0), (1, "en", 1), (1, "en1", 0)]
    }
    assert len(orders) == 5


def test_keys_are_not_confused_by_digits_that_move_between_the_arguments():
    assert (
        len(
            {
                domain_key(*key).tobytes()
                for key in [(1, "1", 1), (11, "", 1), (1, "", 11), (1, "11", 0), (1, "\n1", 1)]
            }
        )
        == 5
    )


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_order_of_a_small_set_is_as_frequent_as_any_other_over_the_epochs(n):
    epochs, possible = 20_000, math.factorial(n)
    keys = np.stack([domain_key(7, "en", epoch) for epoch in range(epochs)], axis=1)
    orders = permutation(np.tile(np.arange(n), epochs), n, np.repeat(keys, n, axis=1)).reshape(
        epochs, n
    )
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == possible
    assert chi_square(counts) < possible + 5 * np.sqrt(2 * possible)


@pytest.mark.parametrize("n", [100_000, 99_991, 65_536, 10**11])
def test_it_is_well_mixed(n):
    index = np.arange(100_000 if n > 100_000 else n)
    image = permutation(index, n, domain_key(7, "en", 3))
    cells = 32
    place = np.bincount(
        (index * cells // len(index)) * cells + (image / n * cells).astype(int),
        minlength=cells * cells,
    )
    step = np.bincount(((image[1:] - image[:-1]) % n / n * cells).astype(int), minlength=cells)
    low_bits = np.bincount((index % cells) * cells + image % cells, minlength=cells * cells)
    for counts in (place, step, low_bits):
        degrees = len(counts) - 1
        assert chi_square(counts) < degrees + 5 * np.sqrt(2 * degrees)
    assert abs(np.corrcoef(index, image)[0, 1]) < 4 / np.sqrt(len(index))


def test_epochs_are_ordered_independently():
    n = 50_000
    first, second = (permutation(np.arange(n), n, domain_key(7, "en", epoch)) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(n)
    assert np.count_nonzero(first == second) < 10


def test_the_order_is_the_one_of_all_runs_so_far():
    """A change here is order-changing: it goes to CHANGELOG.md, and old ledgers are refused."""
    assert permutation(np.arange(10), 10, domain_key(1234, "en", 0)).tolist() == [
        7,
        4,
        2,
        5,
        8,
        6,
        3,
        0,
        9,
        1,
    ]
    assert permutation(np.arange(4), 10**11, domain_key(1234, "zh", 5)).tolist() == [
        20313696682,
        65621168127,
        24191721380,
        82044316703,
    ]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10**11)), max_size=30), SEEDS)
def test_windows_of_many_domains_are_found_as_for_each_alone(pairs, seed):
    sizes, names = np.array([1, 7, 10**6]), ("a", "b", "c")
    domains, ordinals = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    found = shuffled_windows(ordinals, domains, sizes, names, seed).tolist()
    for (k, ordinal), window in zip(pairs, found, strict=True):
        key = domain_key(seed, names[k], ordinal // int(sizes[k]))
        assert [window] == permutation(np.array([ordinal % sizes[k]]), int(sizes[k]), key).tolist()


def test_a_key_has_a_word_for_each_round_and_cannot_be_changed():
    key = domain_key(1, "en", 0)
    assert key.shape == (ROUNDS,) and key.dtype == np.uint64
    with pytest.raises(ValueError):
        key[0] = 0


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())
