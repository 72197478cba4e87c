"""The least used tokens replaced: the size stays, and what is kept can be reached."""

import hashlib
import io
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import least_used, open_vocabulary, replace
from megatron_chatflow.tokenizer.token_map import make_token_map
from tests.tokenizer import bases, samples

KINDS = ("sentencepiece", "gpt2", "llama3")
NEW = 150
TRAINING, HELD_OUT = bases.documents("zh")[:120], bases.documents("zh")[300:340]
ENGLISH, HELD_OUT_ENGLISH = bases.documents("en")[:60], bases.documents("en")[150:190]


@pytest.fixture(scope="module", params=KINDS)
def replaced(request, tmp_path_factory):
    """A vocabulary, what became of it, and the two as tokenizers."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer_type, path = bases.write_base(folder / "base", request.param)
    base = open_vocabulary(tokenizer_type, str(path))
    outcome = replace(base, bases.corpus(TRAINING), bases.corpus(ENGLISH), NEW)
    (folder / "new").mkdir()
    [file, *_] = outcome.vocabulary.save(str(folder / "new"), str(path))
    before, after = (
        load_tokenizer(tokenizer_type, tokenizer_model=p) for p in (path, folder / "new" / file)
    )
    return base, outcome, before, after


def test_the_size_stays_and_the_new_tokens_stand_where_the_old_ones_did(replaced):
    base, outcome, before, after = replaced
    assert after.vocab_size == before.vocab_size
    assert [token.id for token in outcome.new] == outcome.removed == sorted(set(outcome.removed))
    kept = set(range(base.size)) - set(outcome.removed)
    assert all(outcome.vocabulary.text.get(i) == base.text.get(i) for i in kept)


def test_control_tokens_bytes_and_single_byte_tokens_are_never_replaced(replaced):
    base, outcome, _, _ = replaced
    assert all(len(base.text[i]) > 1 for i in outcome.removed)
    assert not base.fixed[outcome.removed].any()


def test_every_token_that_could_be_reached_and_every_new_one_is_reached(replaced):
    base, outcome, _, _ = replaced
    new = outcome.vocabulary
    assert set(new.unreachable(new.removable())) <= set(base.unreachable(base.removable()))


def test_held_out_text_of_the_new_language_takes_fewer_tokens_and_english_hardly_more(replaced):
    _, _, before, after = replaced
    assert sum(map(len, after.encode_batch(HELD_OUT))) < 0.85 * sum(
        map(len, before.encode_batch(HELD_OUT))
    )
    assert sum(map(len, after.encode_batch(HELD_OUT_ENGLISH))) < 1.1 * sum(
        map(len, before.encode_batch(HELD_OUT_ENGLISH))
    )


@settings(max_examples=50)
@given(text=samples.texts)
def test_any_text_comes_back(replaced, text):
    _, _, before, after = replaced
    assert after.decode(after.encode(text)) == before.decode(before.encode(text))


def test_the_token_map_speaks_of_the_old_tokenizer(replaced):
    base, outcome, _, _ = replaced
    content = make_token_map("replace", base, outcome.vocabulary.size, outcome.new)
    assert content["base_sha256"] == hashlib.sha256(base.content).hexdigest()
    assert content["vocab_size"] == content["base_vocab_size"] == base.size
    for entry, token in zip(content["new"], outcome.new, strict=True):
        assert b"".join(base.text[i] for i in entry["pieces"]) == token.text


def reachable(vocabulary) -> set[int]:
    ids = vocabulary.removable()
    return set(ids) - set(vocabulary.unreachable(ids))


@pytest.fixture(scope="module")
def bases_of_all_kinds(tmp_path_factory):
    return {kind: bases.open_base(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@settings(max_examples=12)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), count=st.integers(0, 900))
def test_whatever_is_used_least_no_kept_token_loses_its_parts(
    bases_of_all_kinds, kind, seed, count
):
    base = bases_of_all_kinds[kind]
    removed = least_used(base, np.random.default_rng(seed).random(base.size), count)
    pruned = base.changed(removed, ())
    assert reachable(base) - set(removed) <= reachable(pruned)


def test_tokens_go_by_use_but_parts_only_after_what_is_made_of_them(bases_of_all_kinds):
    base = bases_of_all_kinds["gpt2"]
    usage = np.arange(base.size)[::-1].astype(float)
    order = [set(least_used(base, usage, count)) for count in range(40)]
    assert all(
        len(now) == len(before) + 1 and now > before
        for before, now in zip(order, order[1:], strict=False)
    )
    parts = base.parts()
    taken: set[int] = set()
    for now in order[1:]:
        (token,) = now - taken
        needed = {part for i in range(base.size) if i not in taken for part in parts[i]}
        free = [i for i in base.removable() if i not in taken and i not in needed]
        assert usage[token] == min(usage[free])
        taken = now


def test_tokens_that_the_new_language_uses_are_kept(tmp_path):
    """English alone would give them away first: it never uses them."""
    path = tmp_path / "tokenizer.model"
    model = io.BytesIO()
    lines = [line for text in (*ENGLISH, *TRAINING) for line in text.split("\n")]
    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "minloglevel": 3,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=2500,
        character_coverage=1.0,
        **options,
    )
    path.write_bytes(model.getvalue())
    base = open_vocabulary("SentencePieceTokenizer", str(path))
    outcome = replace(base, bases.corpus(TRAINING), bases.corpus(ENGLISH), 300)
    [frequent] = base.split(["文件".encode()])
    assert not set(frequent) & set(outcome.removed)


def test_more_tokens_than_can_be_replaced_are_refused(tmp_path):
    base = bases.open_base(tmp_path, "gpt2")
    with pytest.raises(
        ChatflowError,
        match=(
            r"--new-tokens 5000 is more than can be replaced: 7\d\d tokens are neither control "
            r"tokens nor bytes; give at most"
        ),
    ):
        replace(base, bases.corpus(TRAINING), bases.corpus(ENGLISH), 5000)


def test_a_tokenizer_without_bytes_that_would_lose_text_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(bases.english_spm(byte_fallback=False))
    base = open_vocabulary("SentencePieceTokenizer", str(path))
    with pytest.raises(
        ChatflowError,
        match=r"would lose \d+ characters of the corpus .*: give a larger --new-tokens",
    ):
        replace(base, bases.corpus(TRAINING), bases.corpus(ENGLISH), 50)
    assert base.fixed[base.split([b"e"])[0]].all()


def test_merges_that_make_one_token_in_several_ways_are_all_taken_out_with_it(tmp_path):
    """LLaMA-3's tokenizer.json lists every split of a token as a merge."""
    content = json.loads(bases.english_bytes())
    model = content["model"]
    rank = {token: i for token, i in model["vocab"].items() if len(token) > 1}
    splits = [
        [token[:i], token[i:]] for token in sorted(rank, key=rank.get) for i in range(1, len(token))
    ]
    model["merges"] = [split for split in splits if all(part in model["vocab"] for part in split)]
    assert len(model["merges"]) > len(rank)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    base = open_vocabulary("HuggingFaceTokenizer", str(path))
    outcome = replace(base, bases.corpus(TRAINING), bases.corpus(ENGLISH), NEW)
    assert set(outcome.vocabulary.unreachable(outcome.vocabulary.removable())) <= set(
        base.unreachable(base.removable())
    )
