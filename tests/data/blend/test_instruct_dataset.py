"""The instruction domain, against a slow reading in plain Python."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.curriculum.schema import Curriculum, Domain, Stage
from megatron_chatflow.data import IndexedDataset, InstructDataset, WindowOptions, open_domains
from megatron_chatflow.data.blend.instruct_dataset import Truncation
from megatron_chatflow.errors import ChatflowError

TURNS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), max_size=4)
CHATS = st.lists(TURNS, min_size=1, max_size=12).filter(lambda chats: any(chats))
SEQ = st.integers(1, 12)


def open_chats(write_numbered, chats, seq_length, documents=None, seed=1, train_on_prompt=False):
    prefix = write_numbered(
        [[n for n, _ in chat] for chat in chats], [[mode for _, mode in chat] for chat in chats]
    )
    return InstructDataset(
        "chat",
        IndexedDataset(prefix),
        documents or (0, len(chats)),
        WindowOptions(seq_length=seq_length, seed=seed),
        train_on_prompt=train_on_prompt,
    )


def slow_window(dataset, chats, conversations, seq_length, train_on_prompt=False):
    rows = {key: [] for key in ("tokens", "labels", "loss_mask", "position_ids", "segment_ids")}
    for segment, d in enumerate(conversations):
        tokens = dataset.document(d).tolist()
        modes = [mode for n, mode in chats[d] for _ in range(n)]
        for i in range(min(len(tokens) - 1, seq_length)):
            rows["tokens"].append(tokens[i])
            rows["labels"].append(tokens[i + 1])
            rows["loss_mask"].append(1.0 if train_on_prompt else 1.0 - modes[i + 1])
            rows["position_ids"].append(i)
            rows["segment_ids"].append(segment)
    for i in range(seq_length - len(rows["tokens"])):
        for key in ("tokens", "labels", "loss_mask"):
            rows[key].append(0)
        rows["position_ids"].append(i)
        rows["segment_ids"].append(len(conversations))
    return rows


@given(CHATS, SEQ, st.data())
def test_windows_are_those_read_position_by_position(write_numbered, chats, seq_length, data):
    begin = data.draw(st.integers(0, len(chats)))
    end = data.draw(st.integers(begin, len(chats)))
    train_on_prompt = data.draw(st.booleans())
    domain = open_chats(
        write_numbered, chats, seq_length, (begin, end), train_on_prompt=train_on_prompt
    )
    windows = data.draw(st.permutations(range(domain.num_samples)))
    batch = domain.read_window(np.array(windows, np.int64))
    for row, window in enumerate(windows):
        span = slice(*domain.packing.starts[window : window + 2])
        expected = slow_window(
            domain.dataset,
            chats,
            [begin + int(c) for c in domain.packing.order[span]],
            seq_length,
            train_on_prompt,
        )
        for key, values in expected.items():
            assert batch[key][row].tolist() == values, key


@given(CHATS, SEQ, st.integers(0, 10**6))
def test_every_label_of_every_conversation_is_read_once_an_epoch(
    write_numbered, chats, seq_length, epoch
):
    domain = open_chats(write_numbered, chats, seq_length)
    batch = domain.read(epoch * domain.num_samples + np.arange(domain.num_samples))
    answers, first, left_out, cut, tokens = [], 0, 0, 0, 0
    for chat in chats:
        modes = [mode for n, mode in chat for _ in range(n)]
        kept = [first + i for i in range(1, min(len(modes), seq_length + 1)) if modes[i] == 0]
        answers += kept
        first += len(modes)
        left_out += len(modes) > 1 and not kept
        cut += bool(kept) and len(modes) > seq_length + 1
        tokens += modes[1:].count(0)
    assert sorted(batch["labels"][batch["loss_mask"] == 1].tolist()) == answers
    assert domain.truncation == Truncation(len(chats), left_out, cut, tokens, tokens - len(answers))


@given(CHATS, SEQ, st.booleans())
def test_every_window_has_a_token_with_loss(write_numbered, chats, seq_length, train_on_prompt):
    domain = open_chats(write_numbered, chats, seq_length, train_on_prompt=train_on_prompt)
    batch = domain.read_window(np.arange(domain.num_samples))
    assert batch["loss_mask"].any(axis=1).all()


def test_only_conversations_without_loss_change_the_packing(write_numbered):
    trained = [[(3 + i % 7, 1), (4, 0)] for i in range(40)]
    beyond = [[(40, 1), (4, 0)], [(9, 1)]]
    kept, mixed = (open_chats(write_numbered, chats, 32) for chats in (trained, trained + beyond))
    assert np.array_equal(kept.packing.order, mixed.packing.order) and np.array_equal(
        kept.packing.starts, mixed.packing.starts
    )
    assert mixed.truncation == Truncation(42, 2, 0, 164, 4)
    all_trained = open_chats(write_numbered, trained + beyond, 32, train_on_prompt=True)
    assert (
        sorted(all_trained.packing.order.tolist()) == list(range(42))
        and all_trained.truncation.left_out == 0
    )


def test_a_domain_without_a_trained_token_is_refused_where_it_has_a_weight(write_numbered):
    prefix = write_numbered([[40, 4], [9]], [[1, 0], [1]])
    domains = {
        "chat": Domain("chat", prefix, "instruct"),
        "other": Domain("other", write_numbered([[99]]), "text"),
    }

    def opened(weights, **more):
        curriculum = Curriculum("samples", domains, (Stage("all", 0, weights),), "repeat")
        return open_domains(curriculum, seq_length=32, seed=1, split="1,0,0", **more)

    with pytest.raises(
        ChatflowError,
        match=(
            "domain chat: .*none of its 2 conversations has a token to train on among its first "
            "33 .*raise seq_length"
        ),
    ):
        opened({"chat": 1.0})
    assert opened({"other": 1.0})["chat"].num_samples == 0


@given(CHATS, SEQ)
def test_provenance_names_the_tokens_of_a_sample(write_numbered, chats, seq_length):
    domain = open_chats(write_numbered, chats, seq_length)
    for ordinal in range(domain.num_samples):
        batch, where = domain.read(np.array([ordinal])), domain.provenance(ordinal)
        for segment, (d, start, stop) in enumerate(where["documents"]):
            inside = batch["segment_ids"][0] == segment
            assert start == 0
            assert (
                domain.dataset.document(d)[:stop].tolist()
                == batch["tokens"][0][inside].tolist() + batch["labels"][0][inside][-1:].tolist()
            )


def test_the_packing_is_the_same_for_every_seed_and_the_order_is_not(write_numbered):
    chats = [[(3 + i % 7, 1), (4, 0)] for i in range(200)]
    first, second = (
        open_chats(write_numbered, chats, 32, seed=1),
        open_chats(write_numbered, chats, 32, seed=2),
    )
    assert np.array_equal(first.packing.order, second.packing.order)
    assert first.window_of(np.arange(40)).tolist() != second.window_of(np.arange(40)).tolist()


def test_a_corpus_without_modes_is_refused(write_numbered):
    dataset = IndexedDataset(write_numbered([[3]]))
    with pytest.raises(ChatflowError, match="sequence modes"):
        InstructDataset("chat", dataset, (0, 1), WindowOptions(seq_length=4, seed=1))


def test_a_pointer_that_is_wrong_inside_the_index_is_refused(write_numbered):
    prefix = write_numbered([[3], [4], [5]], [[0], [0], [0]])
    with open(prefix + ".idx", "r+b") as file:
        file.seek(34 + 3 * 4 + 8)
        file.write(struct.pack("<q", 4))
    with pytest.raises(ChatflowError, match="sequence 1 "):
        InstructDataset("chat", IndexedDataset(prefix), (0, 3), WindowOptions(seq_length=4, seed=1))


def test_nothing_is_written_and_no_kept_packing_is_read(write_numbered):
    """Earlier versions kept the packing in a file with a checksum; here it holds another order."""
    chats, modes = [[3, 4], [5, 2], [4, 4], [9]], [[1, 0], [1, 0], [1, 0], [0]]
    prefix = write_numbered(chats, modes)

    def open_domain() -> InstructDataset:
        return InstructDataset(
            "chat", IndexedDataset(prefix), (0, 4), WindowOptions(seq_length=8, seed=1)
        )

    first = open_domain()
    lengths = np.diff(first.dataset.document_starts(np.arange(5)))
    name = (
        hashlib.sha256(struct.pack("<q", 1) + lengths.astype("<i8").tobytes()).hexdigest()[:32]
        + "-8"
    )
    order, starts = first.packing.order[::-1].astype("<i4"), first.packing.starts.astype("<i8")
    body = struct.pack("<4q", len(starts), 4, 1, 0) + starts.tobytes() + order.tobytes()
    seal = hashlib.sha256(name.encode() + body).digest()
    kept = Path(f"{prefix}.packing-{name}")
    kept.write_bytes(seal + body)
    before = sorted(kept.parent.iterdir())
    again = open_domain()
    assert np.array_equal(again.packing.order, first.packing.order)
    assert sorted(kept.parent.iterdir()) == before and kept.read_bytes() == seal + body
