"""Files that were truncated or whose bytes were changed: one sentence, or the tokens that were
written, and nothing else.
"""

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.curriculum import parse_curriculum
from megatron_chatflow.data import (
    IndexedDataset,
    IndexedDatasetBuilder,
    Manifest,
    open_domains,
    verify,
)
from megatron_chatflow.errors import ChatflowError

SEQ_LENGTH = 8
SUFFIXES = (".bin", ".idx", ".json")


@dataclasses.dataclass(frozen=True)
class Damage:
    """What happens to a file: it is cut at `at`, or the bytes from `at` on are replaced. `at` is
    taken modulo the file's size.
    """

    at: int
    content: bytes | None

    def apply(self, original: bytes) -> bytes:
        """Returns the damaged content; it may happen to be the original."""
        at = self.at % len(original)
        return (
            original[:at]
            if self.content is None
            else (original[:at] + self.content + original[at + len(self.content) :])[
                : len(original)
            ]
        )


DAMAGES = st.one_of(
    st.builds(Damage, st.integers(0, 10**6), st.none()),
    st.builds(Damage, st.integers(0, 10**6), st.binary(min_size=1, max_size=8)),
    st.builds(Damage, st.integers(0, 10**6), st.integers(0, 3).map(lambda n: bytes([n]))),
)


def write(folder, kind):
    """A corpus with empty documents, documents of several sequences and an empty sequence at the
    end; returns the content of its files.
    """
    rng = np.random.default_rng(7)
    lengths = [[5], [3, 4], [], [9], [1, 0, 2], [17], [2], [6, 6], [4], [0], [8], [3, 0]] * 2
    with IndexedDatasetBuilder(folder / "a", np.uint16, kind == "instruct") as builder:
        for document in lengths:
            modes = [(i + 1) % 2 for i in range(len(document))] if kind == "instruct" else None
            builder.add_document(rng.integers(0, 2**15, sum(document)), document, modes)
        manifest = Manifest(
            tokenizer={"type": "t", "name": "n", "hash": "h", "vocab_size": 2**15, "eod": 0},
            dtype="uint16",
            documents=builder.num_documents,
            tokens=builder.num_tokens,
            bytes=321,
            sources=["a.jsonl"],
            append_eod=False,
            conversations=kind == "instruct",
        )
        builder.finalize(manifest)
    return {suffix: (folder / f"a{suffix}").read_bytes() for suffix in SUFFIXES}


def read_all(folder, kind, split="1"):
    """Everything a run can read of the training part: tokens and labels of every window, in order,
    and the documents one by one.
    """
    curriculum = parse_curriculum(
        {
            "clock": "samples",
            "domains": {"a": {"path": "a", "kind": kind}},
            "stages": [{"name": "s", "at": 0, "weights": {"a": 1}}],
        },
        source="test",
        folder=folder,
    )
    domain = open_domains(curriculum, seq_length=SEQ_LENGTH, seed=1, split=split)["a"]
    batch = domain.read_window(np.arange(domain.num_samples))
    return batch["tokens"].tolist(), batch["labels"].tolist()


def read_documents(folder, kind):
    """What asking for documents and for the origin of samples gives; also segments, which need the
    documents of the index.
    """
    dataset = IndexedDataset(folder / "a")
    curriculum = parse_curriculum(
        {
            "clock": "samples",
            "domains": {"a": {"path": "a", "kind": kind}},
            "stages": [{"name": "s", "at": 0, "weights": {"a": 1}}],
        },
        source="test",
        folder=folder,
    )
    options = {"reset_position_ids": True, "reset_attention_mask": True}
    domain = open_domains(curriculum, seq_length=SEQ_LENGTH, seed=1, split="80,15,5", **options)[
        "a"
    ]
    domain.read_window(np.arange(domain.num_samples))
    for ordinal in range(domain.num_samples):
        domain.provenance(ordinal)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def faults(folder):
    """What the slow check says."""
    return verify(folder / "a")


def outcome(read, *arguments):
    """Returns what was read, or None after one sentence that names the corpus."""
    try:
        return read(*arguments)
    except ChatflowError as error:
        assert "\n" not in str(error) and os.fspath(arguments[0] / "a") in str(error), error
        return None


@pytest.fixture(scope="module", params=["text", "instruct"])
def intact(request, tmp_path_factory):
    """(kind, content of the files, what is read of all of them and of a part)."""
    folder = tmp_path_factory.mktemp("intact")
    content = write(folder, request.param)
    return (
        request.param,
        content,
        read_all(folder, request.param),
        read_all(folder, request.param, "80,15,5"),
        read_documents(folder, request.param),
    )


def damaged(tmp_path_factory, content, suffix, damage, manifest):
    folder = tmp_path_factory.mktemp("damaged")
    for name, original in content.items():
        if name != ".json" or manifest:
            (folder / f"a{name}").write_bytes(
                damage.apply(original) if name == suffix else original
            )
    return folder


def undetectable_part(content):
    """The bytes of the `.idx` that hold document indices and, behind them, sequence modes."""
    sequences = int.from_bytes(content[".idx"][18:26], "little")
    return range(34 + 12 * sequences, len(content[".idx"]))


@settings(max_examples=150)
@given(DAMAGES, st.booleans())
def test_a_damaged_index_is_refused_or_the_tokens_are_those_that_were_written(
    intact, tmp_path_factory, damage, manifest
):
    kind, content, everything, part, documents = intact
    folder = damaged(tmp_path_factory, content, ".idx", damage, manifest)
    changed = [
        i
        for i, (old, new) in enumerate(
            zip(content[".idx"], damage.apply(content[".idx"]), strict=False)
        )
        if old != new
    ]
    undetectable = any(i in undetectable_part(content) for i in changed)
    # A boundary that moved to another sequence is as valid as any, and so is an answer that became
    # a prompt (a conversation without an answer is left out): the index alone does not show it.
    if kind == "text" or not undetectable:
        assert outcome(read_all, folder, kind) in (None, everything)
    if not undetectable:
        assert outcome(read_all, folder, kind, "80,15,5") in (None, part)
        assert outcome(read_documents, folder, kind) in (None, documents)
    outcome(read_all, folder, kind, "80,15,5")
    outcome(read_documents, folder, kind)
    if manifest and damage.apply(content[".idx"]) != content[".idx"]:
        assert outcome(faults, folder) != []


@settings(max_examples=60)
@given(DAMAGES, st.booleans())
def test_a_damaged_bin_is_refused_when_its_size_changed_and_found_by_verify_in_any_case(
    intact, tmp_path_factory, damage, manifest
):
    kind, content, everything, _, _ = intact
    folder = damaged(tmp_path_factory, content, ".bin", damage, manifest)
    found = outcome(read_all, folder, kind)
    assert (found is None) == (damage.content is None)
    if damage.apply(content[".bin"]) == content[".bin"]:
        assert found == everything
    elif manifest:
        assert outcome(faults, folder) != []


@settings(max_examples=60)
@given(DAMAGES)
def test_a_damaged_manifest_is_refused_or_the_tokens_are_those_that_were_written(
    intact, tmp_path_factory, damage
):
    kind, content, everything, _, _ = intact
    folder = damaged(tmp_path_factory, content, ".json", damage, manifest=True)
    assert outcome(read_all, folder, kind) in (None, everything)
    outcome(faults, folder)
