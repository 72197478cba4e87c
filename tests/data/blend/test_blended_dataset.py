"""The blend over real corpora and a real plan."""

import dataclasses
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.curriculum import BlendPlan, parse_curriculum
from megatron_chatflow.data import (
    IndexedDataset,
    IndexedDatasetBuilder,
    Manifest,
    open_blend,
    open_domains,
    write_manifest,
)
from megatron_chatflow.errors import ChatflowError

SEQ = 16


@pytest.fixture(scope="module")
def paths(write_numbered):
    chats = [[2 + i % 5, 3 + i % 11] for i in range(60)]
    return {
        "en": write_numbered([[5 + i % 40] for i in range(120)]),
        "zh": write_numbered([[3, 1 + i % 9] for i in range(80)]),
        "chat": write_numbered(chats, [[1, 0]] * len(chats)),
    }


def make_curriculum(paths, kinds=None, weights=None):
    kinds = kinds or {"chat": "instruct"}
    return parse_curriculum(
        {
            "clock": "samples",
            "domains": {
                name: {"path": path, "kind": kinds.get(name, "text")}
                for name, path in paths.items()
            },
            "stages": [
                {"name": "first", "at": 0, "weights": weights or dict.fromkeys(paths, 1.0)},
                {
                    "name": "second",
                    "at": "50%",
                    "weights": weights or {name: 1.0 + i for i, name in enumerate(paths)},
                },
            ],
        },
        source="test",
        folder=".",
    )


def make_plan(curriculum, num_samples=2000, seq_length=SEQ):
    return BlendPlan(
        curriculum, num_samples=num_samples, global_batch_size=8, seq_length=seq_length
    )


@pytest.fixture(scope="module")
def blend(paths):
    curriculum = make_curriculum(paths)
    return open_blend(
        curriculum,
        make_plan(curriculum),
        seq_length=SEQ,
        seed=5,
        split="90,10",
        reset_attention_mask=True,
        reset_position_ids=True,
    )


def test_a_sample_is_what_its_domain_reads_for_its_ordinal(blend):
    batch = blend.read(300, 400)
    domains, ordinals = blend.plan.locate(300, 400)
    assert np.array_equal(batch["domain"], domains) and np.array_equal(batch["ordinal"], ordinals)
    assert len(set(domains.tolist())) == 3
    for row, (k, ordinal) in enumerate(zip(domains, ordinals, strict=True)):
        alone = blend.domains[blend.plan.domain_names[k]].read(np.array([ordinal]))
        for key, value in alone.items():
            assert np.array_equal(batch[key][row], value[0]), key


@given(st.integers(0, 1990), st.integers(0, 60), st.data())
@settings(max_examples=25)
def test_a_range_is_the_same_alone_cut_out_of_a_longer_one_and_by_rows(blend, start, size, data):
    stop = min(start + size, len(blend))
    batch, longer = blend.read(start, stop), blend.read(0, len(blend))
    rows = np.array(
        data.draw(st.lists(st.integers(0, stop - start - 1), max_size=5)) if stop > start else [],
        np.int64,
    )
    chosen = blend.read(start, stop, rows)
    for key in batch:
        assert np.array_equal(batch[key], longer[key][start:stop])
        assert np.array_equal(chosen[key], batch[key][rows])


def test_single_samples_in_any_order_are_those_of_a_range(blend):
    everything = blend.read(0, 600)
    for n in [0, 1, 255, 256, 599, 3, 257, 0]:
        sample = blend[n]
        for key, value in everything.items():
            assert np.array_equal(sample[key], value[n])
            assert sample[key].dtype == value.dtype


def test_a_torch_data_loader_collates_the_samples(blend):
    (batch,) = list(
        torch.utils.data.DataLoader(torch.utils.data.Subset(blend, range(8, 16)), batch_size=8)
    )
    for key, value in blend.read(8, 16).items():
        assert np.array_equal(batch[key].numpy(), value)


def test_every_label_of_each_domain_is_read_once_an_epoch(blend):
    batch = blend.read(0, len(blend))
    for k, name in enumerate(blend.plan.domain_names):
        size = blend.epoch_samples[name]
        for epoch in range(int(blend.plan.counts(len(blend))[k]) // size):
            rows = (batch["domain"] == k) & (batch["ordinal"] // size == epoch)
            labels = np.sort(batch["labels"][rows][batch["loss_mask"][rows] == 1])
            assert len(np.unique(labels)) == len(labels)
            domain = blend.domains[name]
            if name != "chat":
                assert labels.tolist() == list(
                    range(1, domain.dataset.token_range(*domain.documents)[1])
                )


def test_provenance_names_the_documents_of_a_sample(blend):
    batch = blend.read(0, 64)
    for n in range(64):
        where = blend.provenance(n)
        domain = blend.domains[where["domain"]]
        assert (
            blend.plan.domain_names[batch["domain"][n]] == where["domain"]
            and batch["ordinal"][n] == where["ordinal"]
        )
        assert where["path"] == domain.dataset.prefix and where["epoch"] == domain.epoch_of(
            where["ordinal"]
        )
        assert {k: where[k] for k in ("epoch", "documents")} == domain.provenance(where["ordinal"])
        (first, start, _), *_ = where["documents"]
        assert domain.dataset.document(first)[start] == batch["tokens"][n, 0]
        json.dumps(where)


def test_a_sample_outside_the_plan_is_refused(blend):
    for ask in (
        lambda: blend[len(blend)],
        lambda: blend[-1],
        lambda: blend.read(1999, 2001),
        lambda: blend.read(5, 4),
        lambda: blend.provenance(2000),
    ):
        with pytest.raises(IndexError, match="2000"):
            ask()


def test_a_sample_far_out_in_a_huge_run_is_read(paths):
    curriculum = make_curriculum(paths)
    blend = open_blend(curriculum, make_plan(curriculum, 10**11), seq_length=SEQ, seed=5)
    batch = blend.read(10**11 - 40, 10**11)
    assert batch["ordinal"].max() > 10**10
    name = blend.plan.domain_names[batch["domain"][0]]
    assert np.array_equal(
        blend.domains[name].read(batch["ordinal"][:1])["tokens"][0], batch["tokens"][0]
    )


def test_threads_read_what_one_reads(blend):
    expected = blend.read(0, 512)["tokens"]
    with ThreadPoolExecutor(4) as pool:
        ranges = list(pool.map(lambda i: blend.read(8 * i, 8 * i + 8)["tokens"].copy(), range(64)))
        singles = list(pool.map(lambda n: blend[n]["tokens"].copy(), range(512)))
    assert np.array_equal(np.concatenate(ranges), expected)
    assert np.array_equal(np.stack(singles), expected)


def test_a_pickled_blend_reads_the_same(blend):
    expected = blend.read(0, 20)
    copy = pickle.loads(pickle.dumps(blend))
    assert all(np.array_equal(copy.read(0, 20)[key], value) for key, value in expected.items())


def test_the_order_does_not_depend_on_the_order_of_the_file_or_the_other_domains(paths):
    curriculum = make_curriculum(paths)
    backwards = make_curriculum(dict(reversed(paths.items())), weights=dict.fromkeys(paths, 1.0))
    everything, turned = (
        open_blend(c, make_plan(c), seq_length=SEQ, seed=5) for c in (curriculum, backwards)
    )
    for name in paths:
        ordinals = np.arange(30)
        assert np.array_equal(
            everything.domains[name].read(ordinals)["tokens"],
            turned.domains[name].read(ordinals)["tokens"],
        )


def test_training_and_validation_share_no_document(paths):
    curriculum = make_curriculum(paths)
    parts = {
        subset: open_domains(curriculum, seq_length=SEQ, seed=5, split="80,15,5", subset=subset)
        for subset in ("train", "valid", "test")
    }
    for name in paths:
        spans = [parts[subset][name].documents for subset in ("train", "valid", "test")]
        assert spans[0][0] == 0 and spans[0][1] == spans[1][0] and spans[1][1] == spans[2][0]
        assert spans[2][1] == parts["train"][name].dataset.num_documents
        labels = [
            domain[name].read_window(np.arange(domain[name].num_samples))
            for domain in parts.values()
        ]
        seen = np.concatenate([batch["labels"][batch["loss_mask"] == 1] for batch in labels])
        assert len(np.unique(seen)) == len(seen)


def test_a_thousand_domains_are_opened_without_open_files(paths):
    many = {f"d{i:04}": paths["en"] for i in range(1000)}
    curriculum = make_curriculum(many, weights=dict.fromkeys(many, 1.0))
    before = len(os.listdir("/proc/self/fd"))
    domains = open_domains(curriculum, seq_length=SEQ, seed=5)
    assert all(
        domain.read(np.array([0]))["tokens"].shape == (1, SEQ) for domain in domains.values()
    )
    assert len(os.listdir("/proc/self/fd")) <= before


def test_fingerprints_are_those_of_the_corpora(blend, paths):
    assert blend.fingerprints() == {
        name: IndexedDataset(path).fingerprint() for name, path in paths.items()
    }


@pytest.fixture
def copied(paths, tmp_path):
    """The corpora where they can be damaged."""
    for name, path in paths.items():
        for suffix in (".bin", ".idx"):
            shutil.copy(path + suffix, tmp_path / (name + suffix))
    return {name: str(tmp_path / name) for name in paths}


def assert_refused(paths, *named, kinds=None, **settings):
    curriculum = make_curriculum(paths, kinds)
    with pytest.raises(ChatflowError) as caught:
        open_blend(curriculum, make_plan(curriculum), **{"seq_length": SEQ, "seed": 5} | settings)
    assert "\n" not in str(caught.value)
    for part in named:
        assert part in str(caught.value)


def test_a_missing_corpus_is_named(copied):
    os.unlink(copied["zh"] + ".bin")
    assert_refused(copied, "domain zh", copied["zh"] + ".bin does not exist", "preprocess")


def test_a_truncated_corpus_is_named(copied):
    os.truncate(copied["zh"] + ".bin", 40)
    assert_refused(copied, "domain zh", copied["zh"], "truncated", "preprocess")


@pytest.mark.parametrize("code", [4, 5, 7, 8])
def test_tokens_of_another_type_are_noticed(copied, write_corpus, code):
    source = write_corpus([[[1, 2, 3, 4]]], dtype=np.uint16 if code in (4, 5) else np.int32)
    for suffix in (".bin", ".idx"):
        shutil.copy(source + suffix, copied["zh"] + suffix)
    with open(copied["zh"] + ".idx", "r+b") as file:
        file.seek(17)
        file.write(bytes([code]))
    assert_refused(copied, "domain zh", copied["zh"], "preprocess")


def test_the_wrong_kind_is_named_with_the_right_one(copied):
    assert_refused(copied, "domain chat", copied["chat"], "kind: instruct", kinds={"chat": "text"})
    assert_refused(
        copied,
        "domain en",
        copied["en"],
        "kind: text",
        kinds={"chat": "instruct", "en": "instruct"},
    )


def test_another_sequence_length_than_the_plans_is_refused(copied):
    assert_refused(copied, "seq_length 32", str(SEQ), seq_length=32)


def test_a_plan_of_other_domains_is_refused(copied):
    plan = make_plan(make_curriculum(copied))
    fewer = {name: copied[name] for name in ("en", "chat")}
    for curriculum, plan_ in (
        (make_curriculum(fewer), plan),
        (make_curriculum(copied), make_plan(make_curriculum(fewer))),
    ):
        with pytest.raises(ChatflowError, match="domain zh.*weight 0"):
            open_blend(curriculum, plan_, seq_length=SEQ, seed=5)


def test_a_part_with_nothing_to_read_is_refused_only_when_the_plan_draws_from_it(copied):
    assert_refused(copied, "domain", "part of the split", split="99,1", subset="test")
    weights = {"en": 1.0, "zh": 0.0, "chat": 0.0}
    curriculum = make_curriculum(copied, weights=weights)
    for name in ("zh", "chat"):
        for suffix in (".bin", ".idx"):
            os.unlink(copied[name] + suffix)
    with IndexedDatasetBuilder(copied["zh"], np.int32) as builder:
        builder.finalize()
    with IndexedDatasetBuilder(copied["chat"], np.int32, multimodal=True) as builder:
        builder.add_document([1], [1])
        builder.finalize()
    blend = open_blend(curriculum, make_plan(curriculum), seq_length=SEQ, seed=5)
    assert blend.epoch_samples["zh"] == blend.epoch_samples["chat"] == 0
    assert blend.read(0, 10)["tokens"].shape == (10, SEQ)


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"split": "x"}, "split 'x'"),
        ({"subset": "dev"}, "subset 'dev'"),
        ({"eod_mask_loss": True}, "eod"),
    ],
)
def test_settings_that_make_no_sense_are_refused(copied, settings_, named):
    assert_refused(copied, named, **settings_)


def test_a_manifest_of_another_corpus_is_refused(copied):
    dataset = IndexedDataset(copied["en"])
    right = Manifest(
        tokenizer={"type": "t", "name": "n", "hash": "h", "vocab_size": 9, "eod": 0},
        dtype="int32",
        documents=dataset.num_documents,
        tokens=dataset.num_tokens,
        bytes=1,
        sources=["x"],
        append_eod=False,
        conversations=False,
    )
    write_manifest(copied["en"], right)
    curriculum = make_curriculum(copied)
    assert open_domains(curriculum, seq_length=SEQ, seed=5)
    for change in ({"tokens": 1}, {"documents": 1}, {"dtype": "uint16"}, {"conversations": True}):
        write_manifest(copied["en"], dataclasses.replace(right, **change))
        assert_refused(copied, "domain en", "en.json", *change)
