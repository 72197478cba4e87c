"""The split, with megatron-core's as the oracle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from megatron_chatflow.data import document_range, parse_split
from megatron_chatflow.errors import ChatflowError

WEIGHTS = st.lists(
    st.one_of(st.integers(0, 1000), st.floats(0, 1, width=16)), min_size=1, max_size=3
).filter(lambda w: sum(w) > 0)


@given(WEIGHTS, st.integers(0, 10**12))
def test_documents_are_split_as_megatron_rounds_them(weights, num_documents):
    split = ",".join(f"{w:.6f}" if isinstance(w, float) else str(w) for w in weights)
    if not any(float(w) for w in split.split(",")):
        return
    theirs = parse_and_normalize_split(split)
    assert list(parse_split(split)) == theirs
    for subset, span in zip(
        ("train", "valid", "test"), convert_split_vector_to_split_matrix(theirs), strict=True
    ):
        begin, end = document_range(split, subset, num_documents)
        if span is None:
            assert begin == end
        else:
            assert (begin, end) == tuple(int(round(edge * float(num_documents))) for edge in span)


@given(WEIGHTS, st.integers(0, 10**6))
def test_the_subsets_cover_the_corpus_without_overlap(weights, num_documents):
    edges = [
        document_range(",".join(map(str, weights)), subset, num_documents)
        for subset in ("train", "valid", "test")
    ]
    assert edges[0][0] == 0 and edges[2][1] == num_documents
    assert edges[0][1] == edges[1][0] and edges[1][1] == edges[2][0]


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "0", "0,0,0", "-1,2", "nan", "inf,1", "1;2"])
def test_what_is_not_a_split_is_refused(split):
    with pytest.raises(ChatflowError, match="969,30,1"):
        parse_split(split)


def test_an_unknown_subset_is_refused():
    with pytest.raises(ChatflowError, match="train, valid, test"):
        document_range("1", "dev", 10)
