"""tiktoken vocabularies in Megatron's JSON form."""

import json

import pytest
import tiktoken
from hypothesis import given

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from tests.tokenizer import samples

PATTERN = r"\s+|\S+"


def load(path, **options):
    return load_tokenizer("TikTokenizer", tokenizer_model=path, **options)


@pytest.fixture(scope="module")
def tokenizer(files):
    return load(files / "tiktoken.json")


@pytest.fixture(scope="module")
def tekken(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    config = {"pattern": PATTERN, "default_vocab_size": 450, "default_num_special_tokens": 20}
    special = [
        {"rank": i, "token_str": token, "is_control": True}
        for i, token in enumerate(["<unk>", "<s>", "</s>", "[INST]", "<pad>"])
    ]
    path.write_text(
        json.dumps(
            {
                "config": config,
                "vocab": json.loads((files / "tiktoken.json").read_text()),
                "special_tokens": special,
            }
        )
    )
    return path


@given(text=samples.texts)
def test_text_comes_back_and_the_bytes_of_the_tokens_are_its_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.fixture(scope="module")
def without_special():
    ranks = {
        token: i for token, i in samples.byte_ranks(samples.byte_level_bpe()).items() if i < 430
    }
    return tiktoken.Encoding("oracle", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


@given(text=samples.texts)
def test_special_ids_come_first_and_the_rest_is_what_the_library_gives(
    tekken, without_special, text
):
    assert load(tekken).encode(text) == [i + 20 for i in without_special.encode_ordinary(text)]


def test_megatron_s_list_has_its_special_tokens(tokenizer):
    assert (tokenizer.eod, tokenizer.bos, tokenizer.pad, tokenizer.vocab_size) == (2, 1, 4, 1456)
    assert tokenizer.token_bytes()[:1000].sum() == 0
    assert tokenizer.control_id("<mask>") == 3
    assert tokenizer.control_id("the") is None


def test_a_tekken_file_brings_its_own_settings(tekken):
    tokenizer = load(tekken)
    assert (tokenizer.eod, tokenizer.bos, tokenizer.pad, tokenizer.vocab_size) == (2, 1, 4, 450)
    assert tokenizer.control_id("[INST]") == 3


def test_special_tokens_in_text_are_text(tokenizer):
    assert min(tokenizer.encode("<s></s><pad><SPECIAL_20>")) >= 1000


def test_a_batch_gives_the_ids_of_each_text_on_any_number_of_threads(tokenizer):
    expected = [tokenizer.encode(text) for text in samples.TEXTS]
    assert (
        tokenizer.encode_batch(samples.TEXTS)
        == tokenizer.encode_batch(samples.TEXTS, num_threads=2)
        == expected
    )


def test_vocab_size_cuts_the_vocabulary_and_must_fit_it(files):
    cut = load(files / "tiktoken.json", vocab_size=1300)
    assert cut.vocab_size == 1300 == len(cut.token_bytes())
    assert max(cut.encode("".join(samples.LINES))) < 1300
    for size in (1255, 1457):
        with pytest.raises(
            ChatflowError, match=f"vocab_size {size} does not fit .*: give 1256 to 1456"
        ):
            load(files / "tiktoken.json", vocab_size=size)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("YQ== 0\nYg== 1\n", "it is not JSON"),
        ("{}", "not a list of tokens"),
        (
            json.dumps([{"rank": i, "token_bytes": "YQ=="} for i in range(300)]),
            "repeated or single bytes are missing",
        ),
        (json.dumps([{"rank": 7, "token_bytes": "YQ=="}] * 300), "entry 0 has not the rank 0"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, content, reason):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(
        ChatflowError,
        match=r"x\.json is not a tiktoken vocabulary in JSON .*: give Megatron's list",
    ) as error:
        load(tmp_path / "x.json")
    assert reason in str(error.value)


def test_a_text_that_the_library_cannot_split_is_one_message(files):
    tokenizer = load_tokenizer("TikTokenizer", tokenizer_model=files / "tiktoken.json")
    with pytest.raises(
        ChatflowError,
        match="the library cannot split a text of 1,000,001 characters that begins with 'x ",
    ) as error:
        tokenizer.encode("x" + " " * 1_000_000)
    assert "\n" not in str(error.value)
