"""tools/extend_tokenizer.py as a program."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron_chatflow.checkpoint.lease import Lease
from megatron_chatflow.cli.tokenizer import extend_main as main
from megatron_chatflow.cli.tokenizer_extension import is_held_out
from megatron_chatflow.tokenizer import load_tokenizer
from tests.tokenizer import bases

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "extend_tokenizer.py"
ZH, EN = bases.DATA / "zh.jsonl", bases.DATA / "en.jsonl"


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A SentencePiece model with a configuration next to it."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "legacy": false}'
    )
    return bases.write_base(folder, "sentencepiece")[1]


def flags(model, output, *more):
    return [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        model,
        "--input",
        ZH,
        "--output",
        output,
        *more,
    ]


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "new"
    result = run(
        *flags(
            model,
            output,
            "--base-input",
            EN,
            "--new-tokens",
            400,
            "--tensor-model-parallel-size",
            6,
        )
    )
    assert result.returncode == 0, result.stderr
    return output, result


def test_the_folder_holds_the_tokenizer_its_map_and_the_report(done, model):
    output, result = done
    files = [
        "report.json",
        "token_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in output.iterdir()) == files
    assert (output / "tokenizer_config.json").read_bytes() == (
        model.parent / "tokenizer_config.json"
    ).read_bytes()
    assert (
        sentencepiece.SentencePieceProcessor(
            model_file=str(output / "tokenizer.model")
        ).GetPieceSize()
        == 1400
    )
    token_map = json.loads((output / "token_map.json").read_text())
    assert token_map["base_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert len(token_map["new"]) == 400
    assert result.stdout.splitlines()[-1].startswith(
        f"{output}: tokenizer.model, tokenizer.json, tokenizer_config.json, report.json, "
        f"token_map.json; "
    )


def test_the_report_shows_what_the_tokenizers_do_to_held_out_text(done, model):
    output, result = done
    report = json.loads((output / "report.json").read_text())
    old, new = (
        load_tokenizer("SentencePieceTokenizer", tokenizer_model=path)
        for path in (model, output / "tokenizer.model")
    )
    for name, corpus in (("input", "zh"), ("base-input", "en")):
        texts = [text for text in bases.documents(corpus) if is_held_out(text)]
        language = report["languages"][name]
        assert language["documents"] == len(texts) > 10
        for tokenizer, side in ((old, language["before"]), (new, language["after"])):
            encoded = tokenizer.encode_batch(texts)
            assert side["tokens"] == sum(map(len, encoded))
            assert side["round_trips"] == len(texts)
    assert report["languages"]["input"]["change"] < -0.3
    assert (
        report["languages"]["base-input"]["unchanged_documents"]
        == report["languages"]["base-input"]["documents"]
    )
    assert (report["after"]["vocab_size"], report["padded_vocab_size"]["size"]) == (1400, 1536)
    assert report["unreachable_new_tokens"] == 0
    for said in (
        "400 tokens added: 1,400 tokens, padded to 1,536 for --tensor-model-parallel-size 6",
        "unreachable: 0 new tokens",
        "Latin letters keeps",
    ):
        assert said in result.stdout


def test_held_out_documents_are_not_learned_from(model, tmp_path):
    """Where they alone hold a word, it becomes no token."""
    texts = list(bases.documents("zh")[:100])
    word = next(text for text in (f"龘靐齉{i}" for i in range(1000)) if is_held_out(text))
    held_out = [text for text in (f"{word} {i}" for i in range(1000)) if is_held_out(text)][:20]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (*texts, *held_out))
    )
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        str(model),
        "--new-tokens",
        "100",
    ]
    for name in "ab":
        assert (
            main(
                [
                    *words,
                    "--input",
                    str(tmp_path / f"{name}.jsonl"),
                    "--output",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (
        tmp_path / "b" / "tokenizer.model"
    ).read_bytes()


def test_packed_files_other_keys_and_named_held_out_files_give_the_same_tokens_twice(
    tmp_path, capsys
):
    _, base = bases.write_base(tmp_path / "base", "gpt2")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in bases.documents("zh")[:100])
    (tmp_path / "zh.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "held.jsonl").write_text(json.dumps({"body": "打开文档"}) + "\n")
    words = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(base.parent),
        "--input",
        str(tmp_path / "*.gz"),
        "--json-keys",
        "body",
    ]
    words += ["--held-out", f"zh={tmp_path / 'held.jsonl'}", "--new-tokens", "100", "--characters"]
    for name in ("one", "two", "two"):
        assert main([*words, "--output", str(tmp_path / name)]) == 0
    for file in ("tokenizer.json", "token_map.json", "report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (
            tmp_path / "two" / file
        ).read_bytes() or file == "report.json"
    assert list(json.loads((tmp_path / "one" / "report.json").read_text())["languages"]) == ["zh"]


def test_replacing_keeps_the_size_and_lists_what_is_gone(model, tmp_path, capsys):
    words = flags(
        str(model),
        str(tmp_path / "new"),
        "--base-input",
        str(EN),
        "--replace",
        "--new-tokens",
        "100",
    )
    assert main(list(map(str, words))) == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["after"]["vocab_size"] == report["before"]["vocab_size"] == 1000
    assert len(report["removed"]) == 100
    assert "100 tokens replaced: 1,000 tokens, padded to 1,024" in capsys.readouterr().out
    assert {entry["id"] for entry in report["removed"]} == {
        entry["id"]
        for entry in json.loads((tmp_path / "new" / "token_map.json").read_text())["new"]
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--new-tokens", 0], "--new-tokens: '0' is not a positive integer"),
        (["--new-tokens", 5, "--replace"], "--replace needs --base-input"),
        (
            ["--new-tokens", 5, "--replace", "--base-input", EN, "--characters"],
            "--characters has no meaning with --replace",
        ),
        (
            ["--new-tokens", 5, "--base-input", "absent.jsonl"],
            "absent.jsonl cannot be read (No such file or directory)",
        ),
        (
            ["--new-tokens", 5, "--held-out", "zh.jsonl"],
            "--held-out zh.jsonl has no name: write it as NAME=FILE",
        ),
        (["--new-tokens", 5, "--held-out", "zh=-"], "the standard input is not taken"),
        (
            ["--new-tokens", 5, "--held-out", "zh=/dev/null"],
            "/dev/null is a pipe, and text is read more than once: name a file",
        ),
        (["--new-tokens", 5, "--json-keys", "body"], "zh.jsonl, line 1: no key 'body'"),
        (
            ["--new-tokens", 5, "--base-inputs", EN],
            "unknown flag --base-inputs; did you mean --base-input?",
        ),
        (["--new-tokens", "many"], "--new-tokens: 'many' is not a positive integer"),
        (
            ["--new-tokens", 5, "--tokenizer-model", "absent.model"],
            "tokenizer_model absent.model cannot be read",
        ),
        (
            ["--new-tokens", 5, "--tokenizer-type", "TikTokenizer", "--tokenizer-model", EN],
            "is not a tiktoken vocabulary",
        ),
        (
            ["--new-tokens", 5, "--tokenizer-type", "ByteLevelTokenizer"],
            "tokenizer_type ByteLevelTokenizer cannot be extended",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_one_message_and_nothing_is_written(
    model, tmp_path, capsys, more, message
):
    assert main([str(word) for word in flags(model, tmp_path / "new", *more)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_files_is_not_written_into(model, capsys):
    assert main([str(word) for word in flags(model, model.parent, "--new-tokens", 5)]) == 2
    assert "holds other files: name a new folder" in capsys.readouterr().err


def test_a_folder_that_another_process_writes_is_refused(model, tmp_path, capsys):
    output = tmp_path / "new"
    with Lease.next_to(output, "output") as lease:
        lease.acquire()
        assert main([str(word) for word in flags(model, output, "--new-tokens", 20)]) == 2
    assert f"output {output}: another process writes there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_shows_examples():
    shown = run("--help").stdout
    assert "examples:" in shown and "--new-tokens 6000" in shown
