"""Where a sample comes from: found in the corpus alone, without reading all of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_chatflow.data import open_domains
from megatron_chatflow.data.corpus.index_header import CODES, HEADER, MAGIC, VERSION
from tests.pool import command
from tests.sample import CURRICULUM, SETTINGS

TOKENIZER = SETTINGS["tokenizer"]["tokenizer_model"]
LENGTH = ["--seq-length", "64", "--train-samples", "100"]


def test_without_a_tokenizer_the_flags_that_give_the_one_of_the_corpus_are_named(
    sample: Path,
) -> None:
    words = ["locate", "--data-path", str(sample / "en_text_document"), *LENGTH, "--sample", "7"]
    code, out, err = command(*words)
    assert code == 0, err
    found = re.findall(r"\(no text: give (.+)\)", out)
    assert found and set(found) == {
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model .../tokenizer.model"
    }
    flags = found[0].replace("...", str(Path(TOKENIZER).parent)).split()
    code, out, _ = command(*words, *flags)
    assert code == 0 and "no text" not in out


def test_without_a_tokenizer_and_without_manifests_the_size_of_the_vocabulary_is_asked_for(
    sample: Path, tmp_path: Path
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(sample / f"en_text_document{suffix}", tmp_path)
    words = ["locate", "--data-path", str(tmp_path / "en_text_document"), *LENGTH, "--sample", "7"]
    code, _, err = command(*words)
    assert (
        code == 2
        and (
            "the size of the vocabulary is not known; give --tokenizer-type and "
            "--tokenizer-model, or --vocab-size"
        )
        in err
    )
    code, out, _ = command(*words, "--vocab-size", "4096")
    assert code == 0 and "(no text: give --tokenizer-type and --tokenizer-model)" in out


def test_corpora_of_two_tokenizers_are_refused_also_where_none_is_given(
    sample: Path, tmp_path: Path
) -> None:
    from megatron_chatflow.cli.preprocess import main
    from tests.sample import QUICKSTART

    words = [
        "--input",
        QUICKSTART / "data" / "zh.jsonl",
        "--output-prefix",
        tmp_path / "zh",
        "--workers",
        1,
    ]
    assert main([str(word) for word in [*words, "--tokenizer-type", "ByteLevelTokenizer"]]) == 0
    blend = [
        "--data-path",
        "1",
        str(sample / "en_text_document"),
        "1",
        str(tmp_path / "zh_text_document"),
    ]
    code, _, err = command("locate", *blend, *LENGTH, "--sample", "7")
    assert code == 2
    assert (
        "domain zh: zh_text_document was made with the tokenizer bytes "
        "(ByteLevelTokenizer), not with tokenizer.model of domain en"
    ) in err


def test_an_instruction_sample_is_shown_as_its_conversations_stand_in_the_corpus(
    sample: Path, tmp_path: Path
) -> None:
    from megatron_chatflow.curriculum import load_curriculum
    from megatron_chatflow.tokenizer import load_tokenizer

    stages = [{"name": "instruct", "at": 0, "weights": {"instruct": 1}}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    domains = {
        "instruct": CURRICULUM["domains"]["instruct"] | {"path": str(sample / "instruct_document")}
    }
    (tmp_path / "curriculum.yaml").write_text(
        yaml.safe_dump({"domains": domains, "stages": stages})
    )
    code, out, err = command("locate", "--config", str(tmp_path / "run.yaml"), "--sample", "3")
    assert code == 0, err
    tokenizer = load_tokenizer("SentencePieceTokenizer", tokenizer_model=TOKENIZER)
    dataset = open_domains(
        load_curriculum(tmp_path / "curriculum.yaml"), seq_length=64, seed=1234, split="1"
    )["instruct"].dataset
    shown = re.findall(r"  document (\d+), tokens (\d+) to (\d+): (.+)", out)
    assert shown
    for document, first, last, text in shown:
        assert text == repr(
            tokenizer.decode(dataset.document(int(document))[int(first) : int(last) + 1].tolist())
        )


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of one gibibyte, all of it one document but for a short one at each end; its file
    has no blocks on the disk.
    """
    prefix = tmp_path_factory.mktemp("huge") / "corpus"
    lengths = np.array([100, 2**29 - 200, 100], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * 2
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2**30)
    header = HEADER.pack(MAGIC, VERSION, CODES[np.dtype(np.uint16)], 3, 4)
    Path(f"{prefix}.idx").write_bytes(
        header
        + lengths.tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(4, dtype="<i8").tobytes()
    )
    return prefix


def test_the_text_of_a_sample_is_read_without_reading_the_corpus(huge: Path) -> None:
    words = [
        "locate",
        "--data-path",
        str(huge),
        "--sample",
        "57",
        "--seq-length",
        "1024",
        "--train-samples",
        "1000",
    ]
    words += [
        "--split",
        "1",
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        TOKENIZER,
    ]
    code = f"from megatron_chatflow.__main__ import main\nassert main({words!r}) == 0\n"
    code += (
        "print(next(line.split()[1] for line in open('/proc/self/status') if "
        "line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, text, kilobytes = done.stdout.splitlines()
    assert "document 1, tokens " in text and int(kilobytes) < 200_000
