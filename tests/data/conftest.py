"""Corpora for the tests of `data/`, written where they are asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import settings

from megatron_chatflow.data import IndexedDatasetBuilder

settings.register_profile("derandomized", derandomize=True, deadline=None)
settings.load_profile("derandomized")


@pytest.fixture(scope="session")
def write_corpus(tmp_path_factory):
    """A function: documents (lists of sequences, each a list of tokens) and modes (lists alike) ->
    prefix of a new corpus.
    """
    folder, number = tmp_path_factory.mktemp("corpora"), itertools.count()

    def write(documents, modes=None, dtype=np.int32):
        prefix = str(folder / f"corpus{next(number)}")
        with IndexedDatasetBuilder(prefix, dtype, multimodal=modes is not None) as builder:
            for i, document in enumerate(documents):
                builder.add_document(
                    list(itertools.chain(*document)),
                    [len(s) for s in document],
                    None if modes is None else modes[i],
                )
            builder.finalize()
        return prefix

    return write


@pytest.fixture(scope="session")
def write_numbered(write_corpus):
    """A function: the sequence lengths of each document -> prefix of a corpus whose tokens are 0,
    1, 2, ... in order.
    """

    def write(lengths, modes=None):
        number = itertools.count()
        return write_corpus(
            [[[next(number) for _ in range(n)] for n in document] for document in lengths], modes
        )

    return write
