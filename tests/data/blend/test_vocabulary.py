"""Token ids outside of the vocabulary: found before a batch reaches the model, and named with their
documents.
"""

import re

import numpy as np
import pytest

from megatron_chatflow.cli.corpus import verify_main
from megatron_chatflow.curriculum import BlendPlan, parse_curriculum
from megatron_chatflow.data import open_blend
from megatron_chatflow.data.blend.dataloader import BlendDataLoader
from megatron_chatflow.data.corpus.verify import verify
from megatron_chatflow.errors import SampleError
from tests.pool import Pool, command

VOCABULARY, DOCUMENTS, LENGTH, S = 100, 40, 33, 8


def documents(wrong: dict[tuple[int, int], int]) -> list[list[list[int]]]:
    """Documents of ids 1 to 90, each of two sequences, with ids of their own at (document,
    position).
    """
    tokens = 1 + np.arange(DOCUMENTS * LENGTH).reshape(DOCUMENTS, LENGTH) % 90
    for place, token in wrong.items():
        tokens[place] = token
    return [[row[:10].tolist(), row[10:].tolist()] for row in tokens]


def opened(prefix: str, kind: str, vocabulary: int | None = VOCABULARY):
    domains = {"en": {"path": prefix, "kind": kind}}
    stages = [{"name": "one", "at": 0, "weights": {"en": 1}}]
    curriculum = parse_curriculum({"domains": domains, "stages": stages}, source="f", folder="/")
    plan = BlendPlan(curriculum, num_samples=DOCUMENTS * 4, global_batch_size=4, seq_length=S)
    blend = open_blend(curriculum, plan, seq_length=S, seed=1, split="1")
    for domain in blend.domains.values():
        domain.vocab_size = vocabulary
    return blend


def read_all(blend) -> None:
    with BlendDataLoader(
        blend, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1
    ) as loader:
        for start in range(0, len(blend), 4):
            loader.iteration(start, 4)


@pytest.mark.parametrize("token", [VOCABULARY, 70_000, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("kind", ["text", "instruct"])
def test_a_batch_with_such_an_id_names_domain_documents_and_ids(write_corpus, kind, token):
    modes = [[0, 1]] * DOCUMENTS if kind == "instruct" else None
    prefix = write_corpus(documents({(17, 4): token, (17, 5): token}), modes)
    blend = opened(prefix, kind)
    domain = blend.domains["en"]
    for read in (
        lambda: read_all(blend),
        lambda: domain.read_window(np.arange(domain.num_samples)),
    ):
        with pytest.raises(SampleError) as error:
            read()
        message = str(error.value)
        assert (
            message.startswith("domain en: ") and f"vocabulary of {VOCABULARY}: {token};" in message
        )
        assert "documents 1" in message or "document 17 " in message
        assert prefix in message
    read_all(opened(prefix, kind, None))


@pytest.mark.parametrize("place", [(0, 0), (0, 7), (0, 8), (DOCUMENTS - 1, LENGTH - 8)])
def test_no_place_in_a_window_is_missed(write_corpus, place):
    blend = opened(write_corpus(documents({place: VOCABULARY})), "text")
    with pytest.raises(SampleError):
        read_all(blend)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ids_below_the_vocabulary_are_read(write_corpus, dtype):
    read_all(opened(write_corpus(documents({(3, 3): VOCABULARY - 1}), dtype=dtype), "text"))


def test_the_sample_is_the_one_that_provenance_names(write_corpus):
    blend = opened(write_corpus(documents({(17, 4): 500})), "text")
    with pytest.raises(SampleError) as error:
        read_all(blend)
    ordinal = int(str(error.value).split("sample ")[1].split()[0])
    (at,) = [n for n in range(len(blend)) if blend.provenance(n)["ordinal"] == ordinal]
    assert 17 in [document for document, _, _ in blend.provenance(at)["documents"]]


def test_verify_finds_all_of_them_for_a_size_or_a_tokenizer(write_corpus, capsys):
    prefix = write_corpus(documents({(17, 4): 500, (20, 1): -3}))
    assert verify(prefix, vocab_size=501)[0].endswith(
        "is -3, outside the vocabulary of 501 (document 20)"
    )
    assert verify_main([prefix, "--vocab-size", "100"]) == 1
    first = 17 * LENGTH + 4
    expected = (
        f"token {first} is 500, outside the vocabulary of 100 (document 17); 2 such tokens in "
        f"all, from -3 to 500"
    )
    assert expected in capsys.readouterr().out
    assert verify_main([prefix, "--tokenizer-type", "ByteLevelTokenizer"]) == 1
    assert "outside the vocabulary of 25" in capsys.readouterr().out
    clean = write_corpus(documents({}))
    assert verify_main([clean, "--vocab-size", "91"]) == 0
    assert verify_main([clean, "--vocab-size", "90"]) == 1
    assert verify_main([clean, "--vocab-size", "0"]) == 2
    assert verify_main([clean, "--tokenizer-model", "x"]) == 2


MODEL = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --micro-batch-size 2 --lr 1e-3"
LENGTHS = "--seq-length 8 --global-batch-size 4"


def run(name: str, *words: str) -> tuple[int, str, str]:
    model = [] if name == "plan" else MODEL.split()  # plan reads no settings of the model
    return command(name, *model, *LENGTHS.split(), *words)


def test_plan_preflight_and_train_stop_with_one_message(write_corpus, pool: Pool):
    hidden = write_corpus(documents({(17, 4): 500}))
    seen = write_corpus(documents({(0, 0): 500}))
    size = ["--vocab-size", "100", "--split", "1", "--train-samples", "160"]
    code, _, err = run("plan", *size, "--data-path", "1", seen)
    assert code == 2 and err.count("\n") == 1 and "500; give the tokenizer" in err
    code, out, _ = run("preflight", "--world-size", "1", *size, "--data-path", "1", seen)
    assert code == 2 and "500; give the tokenizer" in out
    code, out, err = run("plan", *size, "--data-path", "1", hidden)
    assert code == 0 and re.search(
        r"token ids are below 100 in the 32 windows of 16\d that were looked at", out
    ), (out, err)
    ((code, _, err),) = pool.run(1, run, "train", *size, "--data-path", "1", hidden)
    assert code == 1 and err.count("error: domain ") == 1 and "Traceback" not in err, err
    assert re.search(r"\(document(s 16 to| 17|s 17 to)", err), err
