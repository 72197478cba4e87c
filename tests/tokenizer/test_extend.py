"""Vocabularies extended: what is new is reached, what is old stays."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as protocol

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.bytelevel_vocabulary import byte_alphabet
from megatron_chatflow.tokenizer.extend import extend, open_vocabulary
from megatron_chatflow.tokenizer.token_map import make_token_map
from tests.tokenizer import bases, samples

KINDS = ("sentencepiece", "gpt2", "llama3")
NEW = 200
CHINESE = bases.documents("zh")
TRAINING, HELD_OUT = CHINESE[:120], CHINESE[300:340]
ENGLISH = bases.documents("en")[150:190]


@pytest.fixture(scope="module", params=KINDS)
def extended(request, tmp_path_factory):
    """A vocabulary, what became of it, and the two as tokenizers."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer_type, path = bases.write_base(folder / "base", request.param)
    base = open_vocabulary(tokenizer_type, str(path))
    outcome = extend(base, bases.corpus(TRAINING[:50], TRAINING[50:]), NEW)
    (folder / "new").mkdir()
    [file, *_] = outcome.vocabulary.save(str(folder / "new"), str(path))
    before, after = (
        load_tokenizer(tokenizer_type, tokenizer_model=p) for p in (path, folder / "new" / file)
    )
    return base, outcome, before, after


def test_the_new_ids_stand_behind_the_old_ones_and_all_old_ones_keep_their_meaning(extended):
    base, outcome, before, after = extended
    assert [token.id for token in outcome.new] == list(range(base.size, base.size + NEW))
    assert after.vocab_size == before.vocab_size + NEW
    assert (after.eod, after.bos, after.pad) == (before.eod, before.bos, before.pad)
    assert after.token_bytes()[: base.size].tolist() == before.token_bytes().tolist()
    assert all(outcome.vocabulary.text.get(i) == text for i, text in base.text.items())


def test_every_new_token_is_reached_and_no_old_one_is_lost(extended):
    base, outcome, _, _ = extended
    new = outcome.vocabulary
    assert new.unreachable([token.id for token in outcome.new]) == []
    assert new.unreachable(new.removable()) == base.unreachable(base.removable())


def test_held_out_text_of_the_new_language_takes_fewer_tokens(extended):
    _, _, before, after = extended
    assert sum(map(len, after.encode_batch(HELD_OUT))) < 0.8 * sum(
        map(len, before.encode_batch(HELD_OUT))
    )


def test_english_keeps_its_tokens(extended):
    _, outcome, before, after = extended
    assert outcome.other_script
    assert after.encode_batch(ENGLISH) == before.encode_batch(ENGLISH)


@settings(max_examples=80)
@given(text=st.text(st.characters(max_codepoint=0x2DFF), max_size=30))
def test_text_in_other_scripts_keeps_its_tokens(extended, text):
    """Chinese characters and punctuation begin at U+2E80, and none of the others begins with the
    same two bytes.
    """
    _, _, before, after = extended
    assert after.encode(text) == before.encode(text)


MIXED = st.lists(
    st.sampled_from([*samples.TEXTS, *CHINESE[:5], "LibreOffice ", "按 Ctrl", "，", "中"])
    | st.text(max_size=20),
    max_size=6,
).map("".join)


@settings(max_examples=80)
@given(text=MIXED)
def test_any_text_comes_back_and_keeps_its_tokens_where_none_is_new(extended, text):
    base, _, before, after = extended
    ids, old = after.encode(text), before.encode(text)
    assert after.decode(ids) == before.decode(old)
    assert len(ids) <= len(old)
    if all(i < base.size for i in ids):
        assert ids == old


@settings(max_examples=40)
@given(text=MIXED)
def test_new_tokens_are_old_ones_joined(extended, text):
    base, outcome, before, after = extended
    constituents = {
        token.id: split
        for token, split in zip(
            outcome.new, base.split([token.text for token in outcome.new]), strict=True
        )
    }
    joined = [old for token in after.encode(text) for old in constituents.get(token, [token])]
    assert joined == before.encode(text)


def test_the_token_map_has_what_each_new_token_was(extended):
    base, outcome, before, after = extended
    content = json.loads(
        json.dumps(make_token_map("extend", base, outcome.vocabulary.size, outcome.new))
    )
    assert (content["version"], content["kind"]) == (1, "extend")
    assert (content["base_vocab_size"], content["vocab_size"]) == (
        before.vocab_size,
        after.vocab_size,
    )
    lengths = before.token_bytes()
    for entry, token in zip(content["new"], outcome.new, strict=True):
        assert entry["id"] == token.id and len(entry["pieces"]) == len(entry["chars"]) > 1
        assert max(entry["pieces"]) < base.size
        assert sum(base.text[i] != b"" for i in entry["pieces"]) == len(entry["pieces"])
        assert b"".join(base.text[i] for i in entry["pieces"]) == token.text
        assert all(
            0 < share <= lengths[i]
            for share, i in zip(entry["chars"], entry["pieces"], strict=True)
        )
        if (decoded := token.text.decode(errors="ignore")).encode() == token.text:
            assert sum(entry["chars"]) == pytest.approx(len(decoded), abs=1e-4)


def test_the_same_text_gives_the_same_bytes_whatever_its_batches(extended, tmp_path):
    base, outcome, _, _ = extended
    again = extend(base, bases.corpus(*([text] for text in TRAINING)), NEW)
    assert again.vocabulary.content == outcome.vocabulary.content


@pytest.mark.parametrize("kind", KINDS)
def test_characters_alone_are_added_the_most_frequent_first(kind, tmp_path):
    base = bases.open_base(tmp_path, kind)
    outcome = extend(base, bases.corpus(TRAINING), 150, characters=True)
    texts = [token.text for token in outcome.new]
    decoded = [text.decode() for text in texts if text.decode(errors="ignore").encode() == text]
    assert all(len(text) == 1 for text in decoded)
    counts = [sum(document.count(char) for document in TRAINING) for char in decoded]
    if kind == "sentencepiece":
        assert len(decoded) == 150 and counts == sorted(counts, reverse=True)
    else:
        # The others are the bytes that several characters begin with; a character's own count is
        # that of its last merge.
        assert len(decoded) > 70
        missing = {
            char for document in TRAINING for char in document if "\u4e00" <= char <= "\u9fff"
        } - set(decoded)
        assert max(sum(document.count(char) for document in TRAINING) for char in missing) <= min(
            counts
        )


def test_special_tokens_behind_the_vocabulary_keep_their_ids(tmp_path):
    """Where a tokenizer.json adds tokens that its vocabulary lacks, the library numbers them from
    the vocabulary's end on.
    """
    base = bases.open_base(tmp_path, "gpt2")
    outcome = extend(base, bases.corpus(TRAINING), 50)
    backend = tokenizers.Tokenizer.from_str(outcome.vocabulary.content.decode())
    assert backend.token_to_id("<|endoftext|>") == tokenizers.Tokenizer.from_str(
        base.content.decode()
    ).token_to_id("<|endoftext|>")
    assert sorted(backend.get_vocab().values()) == list(range(base.size + 50))


def test_a_piece_that_no_merge_leads_to_is_not_brought_to_life(tmp_path):
    """A piece of the model that cannot be reached (here 人生而) would change old text once a new
    piece led to it.
    """
    model = protocol.ModelProto()
    model.ParseFromString(bases.english_spm())
    lowest = min(piece.score for piece in model.pieces)
    for i, char in enumerate(("人", "生", "而", "人生而")):
        model.pieces.add(piece=char, score=lowest - 1 - i, type=1)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    base = open_vocabulary("SentencePieceTokenizer", str(path))
    assert base.unreachable([base.size - 1]) == [base.size - 1]
    outcome = extend(base, bases.corpus(["人生而自由，人生不易"] * 50 + list(TRAINING)), 20)
    assert outcome.vocabulary.unreachable([base.size - 1]) == [base.size - 1]
    assert not {"人生", "生而"} & {token.text.decode() for token in outcome.new}


SPACED = st.lists(
    MIXED | st.integers(1, 40).map(lambda n: " " * n) | st.sampled_from(["\n", "a", "\u2581"]),
    max_size=5,
).map("".join)


@pytest.fixture(scope="module")
def both_files(tmp_path_factory):
    """One extended model, read by SentencePiece and by `tokenizers`; runs of spaces have pieces of
    one score, as in LLaMA's.
    """
    folder = tmp_path_factory.mktemp("both")
    model = protocol.ModelProto()
    model.ParseFromString(bases.english_spm())
    for length in range(2, 17):
        model.pieces.add(piece="\u2581" * length, score=-1e9, type=1)
    (folder / "base.model").write_bytes(model.SerializeToString())
    outcome = extend(
        open_vocabulary("Llama2Tokenizer", str(folder / "base.model")), bases.corpus(TRAINING), NEW
    )
    assert outcome.vocabulary.save(str(folder), str(folder / "base.model")) == [
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    return sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer.model")
    ), load_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder)


@settings(max_examples=100)
@given(text=SPACED)
def test_the_tokenizer_json_next_to_a_sentencepiece_model_gives_the_same_ids_and_text(
    both_files, text
):
    model, fast = both_files
    ids = model.encode(text)
    assert fast.encode(text) == ids
    assert fast.decode(ids) == model.decode(ids)


def test_symbols_that_a_model_s_maker_defined_are_in_no_new_token(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(bases.english_spm(user_defined_symbols="中"))
    base = open_vocabulary("SentencePieceTokenizer", str(path))
    outcome = extend(base, bases.corpus(["中文中文"] * 50, TRAINING), 100)
    assert not any("中" in token.text.decode() for token in outcome.new)


def test_scores_stay_in_order_where_integer_steps_are_too_fine_for_float32(tmp_path):
    """LLaMA-2 gives pieces of spaces the score -1e9, next to which float32 holds multiples of 64
    alone.
    """
    model = protocol.ModelProto()
    model.ParseFromString(bases.english_spm())
    model.pieces.add(piece="\u2581\u2581", score=-1e9, type=1)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    outcome = extend(open_vocabulary("Llama2Tokenizer", str(path)), bases.corpus(TRAINING), NEW)
    model.ParseFromString(outcome.vocabulary.content)
    scores = [piece.score for piece in model.pieces][-NEW:]
    assert max(scores) < -1e9 and all(a > b for a, b in zip(scores, scores[1:], strict=False))


class TestRefusals:
    def model(self, tmp_path, **options):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(bases.english_spm(**options))
        return str(path)

    def test_more_tokens_than_the_corpus_has_candidates_for(self, tmp_path):
        base = bases.open_base(tmp_path, "sentencepiece")
        with pytest.raises(
            ChatflowError,
            match=(
                r"--new-tokens 500 is more than the corpus holds: \d+ candidates occur at least "
                r"twice; give at most that, or more"
            ),
        ):
            extend(base, bases.corpus(TRAINING[:1]), 500)

    def test_a_corpus_without_letters(self, tmp_path):
        with pytest.raises(ChatflowError, match="the corpus has no letters, .*: check --input"):
            extend(bases.open_base(tmp_path, "gpt2"), bases.corpus(["12 34", "..."]), 5)

    def test_a_tokenizer_without_bytes_that_would_still_lose_text(self, tmp_path):
        base = open_vocabulary("SentencePieceTokenizer", self.model(tmp_path, byte_fallback=False))
        with pytest.raises(
            ChatflowError,
            match=(
                r"would lose \d+ characters of the corpus .*: give a larger --new-tokens .* or "
                r".* byte fallback"
            ),
        ):
            extend(base, bases.corpus(TRAINING), 100)

    def test_a_tokenizer_without_bytes_is_extended_where_all_characters_fit(self, tmp_path):
        base = open_vocabulary("SentencePieceTokenizer", self.model(tmp_path, byte_fallback=False))
        outcome = extend(base, bases.corpus(["人人生而自由", "人人生而自由"]), 6)
        library = sentencepiece.SentencePieceProcessor(model_proto=outcome.vocabulary.content)
        assert library.decode(library.encode("人自由生而")) == "人自由生而"
        with_unknown = make_token_map("extend", base, outcome.vocabulary.size, outcome.new)["new"]
        assert all(
            sum(entry["chars"]) == len(token.text.decode())
            for entry, token in zip(with_unknown, outcome.new, strict=True)
        )

    def test_a_unigram_model(self, tmp_path):
        model = io.BytesIO()
        options = {
            "vocab_size": 300,
            "model_type": "unigram",
            "minloglevel": 3,
            "hard_vocab_limit": False,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(samples.LINES * 3), model_writer=model, **options
        )
        (tmp_path / "u.model").write_bytes(model.getvalue())
        with pytest.raises(
            ChatflowError,
            match=(
                "u.model is a SentencePiece model of type unigram, .*: give one trained with "
                "--model_type=bpe"
            ),
        ):
            open_vocabulary("SentencePieceTokenizer", str(tmp_path / "u.model"))

    def test_a_tokenizer_json_of_characters(self, tmp_path):
        path = tmp_path / "tokenizer.json"
        samples.metaspace_bpe().save(str(path))
        with pytest.raises(
            ChatflowError, match=r"is a BPE of characters, not of bytes: give the tokenizer\.model"
        ):
            open_vocabulary("HuggingFaceTokenizer", str(path))

    def test_a_tokenizer_json_without_merges(self, tmp_path):
        backend = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
        )
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ChatflowError, match="is of type WordLevel, which has no merges"):
            open_vocabulary("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))

    def test_a_byte_level_vocabulary_that_lacks_bytes_of_the_text(self, tmp_path):
        """As SmolLM2's, which has no token for the byte 4."""
        content = json.loads(bases.english_bytes())
        gone = byte_alphabet()[4]
        content["model"]["vocab"] = {
            token: i for token, i in content["model"]["vocab"].items() if gone not in token
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        base = open_vocabulary("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))
        assert len(extend(base, bases.corpus(TRAINING), 20).new) == 20
        with pytest.raises(
            ChatflowError,
            match=(
                r"would lose 1 characters of the corpus \('\\x04'\), .*: .* take them out of "
                r"the text, or start from"
            ),
        ):
            extend(base, bases.corpus(TRAINING, ["a\x04b"]), 20)

    def test_kinds_that_are_not_extended(self, tmp_path):
        with pytest.raises(
            ChatflowError,
            match=(
                r"tokenizer_type TikTokenizer cannot be extended: give a SentencePiece BPE "
                r"model .* or a byte-level tokenizer\.json"
            ),
        ):
            open_vocabulary("TikTokenizer", str(tmp_path))


def test_frozen_symbols_and_document_ends_are_borders(tmp_path):
    base = bases.open_base(tmp_path, "sentencepiece")
    symbols, ends = base.encode(["ab", "", "中中"])
    assert ends.tolist() == [
        *([False] * (np.flatnonzero(ends)[0])),
        True,
        *([False] * (len(ends) - np.flatnonzero(ends)[0] - 2)),
        True,
    ]
    assert len(symbols) == len(ends)
