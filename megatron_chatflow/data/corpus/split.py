"""Which documents are for training, validation and test: Megatron's `--split`."""

import math

from megatron_chatflow.errors import DataError

SUBSETS = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """Read Megatron's `--split`: up to three non-negative numbers with commas between.

    Args:
        split: e.g. "969,30,1".

    Returns:
        The fractions of training, validation and test; missing ones are 0.

    Raises:
        DataError: not one to three non-negative numbers of which one is positive.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if (
        not 1 <= len(weights) <= 3
        or not all(w >= 0 and math.isfinite(w) for w in weights)
        or sum(weights) <= 0
    ):
        raise DataError(
            f"split {split!r}: write one to three non-negative numbers with commas between, "
            f'as in "969,30,1"'
        )
    weights += [0.0] * (3 - len(weights))
    total = sum(weights)
    return weights[0] / total, weights[1] / total, weights[2] / total


def document_range(split: str, subset: str, num_documents: int) -> tuple[int, int]:
    """Return the documents [begin, end) of a subset, cut in file order and rounded as in Megatron.

    Megatron-core (`blended_megatron_dataset_builder.py`) rounds the running sums of the fractions
    times the number of elements. Its elements are sequences for GPT; here they are documents, so
    that no document is cut. With one sequence per document, as `preprocess_data.py` writes, it is
    the same.

    Args:
        split: as `parse_split`.
        subset: "train", "valid" or "test".
        num_documents: documents in the corpus.

    Raises:
        DataError: an unknown subset, or as `parse_split`.
    """
    if subset not in SUBSETS:
        raise DataError(f"subset {subset!r}: write one of {', '.join(SUBSETS)}")
    begin = 0.0
    for name, fraction in zip(SUBSETS, parse_split(split), strict=True):
        end = begin + fraction
        if name == subset:
            break
        begin = end
    return round(begin * num_documents), min(round(end * num_documents), num_documents)
