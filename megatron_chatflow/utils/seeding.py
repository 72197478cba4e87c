"""Seeds derived from names, so that nothing random depends on the order in which it is drawn."""

from __future__ import annotations

import hashlib


def seed_from(name: str, num_bytes: int = 8) -> int:
    """Return a seed that is a function of a name alone, in [0, 2^(8 num_bytes - 1)).

    Args:
        name: everything that the seed depends on, e.g. f"{run_seed}/{iteration}".
        num_bytes: bytes of the BLAKE2b hash to use; the lowest bit is dropped, so the seed fits a
            signed integer of this size.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=num_bytes).digest()
    return int.from_bytes(digest, "little") >> 1
