"""Which tokens of a vocabulary make room for others."""

import heapq

import numpy as np

from megatron_chatflow.tokenizer.vocabulary_base import Vocabulary


def least_used(vocabulary: Vocabulary, usage: np.ndarray, wanted: int) -> list[int]:
    """Chooses the least used tokens that nothing else needs.

    A token that a kept one is merged from is kept, else that one could not be reached. So tokens
    are taken one by one, always the least used of those that no remaining token is merged from (of
    equally used ones the last), which may free its parts. Control and added tokens, bytes and
    single-byte tokens are never taken.

    Args:
        vocabulary: the tokens.
        usage: how much each id is used float[size].
        wanted: how many to choose.

    Returns:
        The ids, ascending; fewer than `wanted` where no more can be taken.
    """
    parts = vocabulary.parts()
    needed = np.zeros(vocabulary.size, np.int64)
    for each in parts:
        for part in set(each):
            needed[part] += 1
    heap = [(float(usage[i]), -i) for i in vocabulary.removable() if not needed[i]]
    heapq.heapify(heap)
    taken: list[int] = []
    while heap and len(taken) < wanted:
        token = -heapq.heappop(heap)[1]
        taken.append(token)
        for part in set(parts[token]):
            needed[part] -= 1
            if not needed[part] and not vocabulary.fixed[part]:
                heapq.heappush(heap, (float(usage[part]), -part))
    return sorted(taken)
