"""A shuffle that is computed, not stored: the place of element i is a function of (i, n, key).

A generalized Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): i
is written as two digits (left, right) in the mixed base a x b with a*b >= n, and each round adds a
keyed hash of one digit to the other, which can always be undone; so it is a bijection of [0, a*b).
An image outside [0, n) is sent through again ("cycle walking") until it is inside, which makes it a
bijection of [0, n). a*b exceeds n by less than sqrt(n) + 1, so few elements are sent twice (below n
= 16 it is more, because digits of fewer than four values mix badly). The hash is the finalizer of
splitmix64. All is integer arithmetic, except for a correctly rounded square root: every machine
computes the same order.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

ROUNDS = 8
_SMALLEST_BASE = np.uint64(4)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _32 = (np.uint64(n) for n in (30, 27, 31, 32))


@lru_cache(maxsize=1 << 14)
def domain_key(seed: int, name: str, epoch: int) -> np.ndarray:
    """Return the key of one epoch of a domain: uint64 [ROUNDS], read only.

    It is a function of the three arguments alone.
    """
    digest = hashlib.blake2b(
        f"{int(seed)}\n{int(epoch)}\n{name}".encode(), digest_size=8 * ROUNDS
    ).digest()
    key = np.frombuffer(digest, "<u8").astype(np.uint64)
    key.flags.writeable = False
    return key


def permutation(index: np.ndarray, n: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return where the keyed permutation of [0, n) sends elements.

    Args:
        index: int64 [m], each in [0, n).
        n: size of the set, 1 to 2**62; or int64 [m], one for each element.
        key: uint64 [ROUNDS]; or [ROUNDS, m], one for each element.

    Returns:
        int64 [m], each in [0, n).
    """
    index, n = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(n, np.int64))
    assert np.all((index >= 0) & (index < n)), "index outside [0, n)"
    key = np.broadcast_to(key if key.ndim == 2 else key[:, None], (ROUNDS, len(index)))
    # The base a x b of the two digits, about sqrt(n) each: uint64 [m].
    a = np.maximum(
        np.floor(np.sqrt(n.astype(np.float64))).astype(np.uint64) + np.uint64(1), _SMALLEST_BASE
    )
    n = n.astype(np.uint64)
    b = np.maximum((n + a - np.uint64(1)) // a, _SMALLEST_BASE)
    out = _shuffle(index.astype(np.uint64), a, b, key)
    # Cycle walking: elements outside [0, n) are sent through again until none is left.
    outside = np.flatnonzero(out >= n)
    while len(outside):
        again = _shuffle(out[outside], a[outside], b[outside], key[:, outside])
        out[outside] = again
        outside = outside[again >= n[outside]]
    return out.astype(np.int64)


def shuffled_windows(
    ordinals: np.ndarray, domains: np.ndarray, sizes: np.ndarray, names: Sequence[str], seed: int
) -> np.ndarray:
    """Return the window that each ordinal reads; each epoch of a domain has a different order.

    Args:
        ordinals: int64 [m], the position of each sample within its domain; `ordinal // size` is the
            epoch.
        domains: int64 [m], which domain each sample belongs to.
        sizes: int64 [domains], the windows per epoch of each domain; positive where used.
        names: the domains' names.
        seed: the seed of the run.

    Returns:
        int64 [m], each in [0, sizes[domain]).
    """
    # One key per (epoch, domain) that occurs: [ROUNDS, pairs], then one per element: [ROUNDS, m].
    epochs, index = np.divmod(ordinals, sizes[domains])
    codes, inverse = np.unique(epochs * len(names) + domains, return_inverse=True)
    keys = [
        domain_key(seed, names[code % len(names)], code // len(names)) for code in codes.tolist()
    ]
    return (
        permutation(index, sizes[domains], np.stack(keys, axis=1)[:, inverse])
        if keys
        else np.zeros(0, np.int64)
    )


def _shuffle(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    # Feistel rounds: each digit in turn takes a keyed hash of the other, modulo its base.
    left, right = np.divmod(x, b)
    for i in range(0, ROUNDS, 2):
        left = _add(left, _hash(right, key[i]), a)
        right = _add(right, _hash(left, key[i + 1]), b)
    return left * b + right


def _hash(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return 32 well mixed bits of (x, key), as uint64."""
    x = x * _GOLDEN + key
    x = (x ^ (x >> _30)) * _MIX1
    x = (x ^ (x >> _27)) * _MIX2
    return (x ^ (x >> _31)) >> _32


def _add(digit: np.ndarray, bits: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Add 32 random bits, scaled to [0, base), to a digit, modulo the base (below 2**32)."""
    total = digit + ((bits * base) >> _32)
    return np.where(total >= base, total - base, total)
