"""A mistake of the user is one message; a bug of this package keeps its traceback."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chatflow.cli import convert, corpus, preprocess, tokenizer
from tests.pool import command
from tests.sample import QUICKSTART

TOKENIZER = [
    "--tokenizer-type",
    "SentencePieceTokenizer",
    "--tokenizer-model",
    str(QUICKSTART / "tokenizer.model"),
]


def _broadcast(*_: Any, **__: Any) -> None:
    np.zeros(2) + np.zeros(3)


def _key(*_: Any, **__: Any) -> None:
    raise KeyError("num_layers")


def _type(*_: Any, **__: Any) -> None:
    raise TypeError("unsupported operand")


def _system(*_: Any, **__: Any) -> None:
    raise OSError(errno.EBADF, "Bad file descriptor")


BUGS = {"ValueError": _broadcast, "KeyError": _key, "TypeError": _type, "OSError": _system}


def _plan(sample: Path, folder: Path) -> Any:
    return command("plan", "--config", str(sample / "run.yaml"))


def _locate(sample: Path, folder: Path) -> Any:
    return command("locate", "--config", str(sample / "run.yaml"), "--sample", "3")


def _evaluate(sample: Path, folder: Path) -> Any:
    (folder / "config.yaml").write_text((sample / "run.yaml").read_text())
    return command("evaluate", "--load", str(folder))


def _preprocess(sample: Path, folder: Path) -> Any:
    words = ["--input", str(QUICKSTART / "data" / "zh.jsonl"), "--output-prefix", folder / "zh"]
    return preprocess.main([*map(str, words), *TOKENIZER])


def _merge(sample: Path, folder: Path) -> Any:
    for suffix in (".bin", ".idx"):
        (folder / f"a{suffix}").write_bytes((sample / f"zh_text_document{suffix}").read_bytes())
    return corpus.merge_main(["--input", str(folder), "--output-prefix", str(folder / "all")])


def _convert(sample: Path, folder: Path) -> Any:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return convert.main(["--load-dir", str(folder / "hf"), "--save-dir", str(folder / "run")])


def _extend(sample: Path, folder: Path) -> Any:
    words = ["--input", str(QUICKSTART / "data" / "zh.jsonl"), "--new-tokens", "4"]
    return tokenizer.extend_main([*TOKENIZER, *words, "--output", str(folder / "extended")])


COMMANDS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "plan": (_plan, "megatron_chatflow.curriculum.forecast"),
    "locate": (
        _locate,
        "megatron_chatflow.data.corpus.indexed_dataset.IndexedDataset.document_starts",
    ),
    "evaluate": (_evaluate, "megatron_chatflow.evaluation.eval_model.choose_weights"),
    "preprocess": (_preprocess, "megatron_chatflow.data.preprocess.encoder.Encoder.encode"),
    "merge": (_merge, "megatron_chatflow.data.corpus.writer.IndexedDatasetBuilder.add_index"),
    "convert": (_convert, "megatron_chatflow.conversion.import_hf.convert"),
    "extend": (_extend, "megatron_chatflow.cli.tokenizer_extension.open_vocabulary"),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_bug_passes_through_every_command(
    name: str, bug: str, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = COMMANDS[name]
    monkeypatch.setattr(place, BUGS[bug])
    with pytest.raises(Exception) as caught:  # noqa: B017 (its exact type is compared below)
        run(sample, tmp_path)
    assert type(caught.value).__name__ == bug


@pytest.mark.parametrize("script", ["chatflow", "tools/merge_datasets.py"])
def test_a_bug_is_exit_code_1_with_a_traceback(script: str, sample: Path, tmp_path: Path) -> None:
    words = {
        "chatflow": ["plan", "--config", str(sample / "run.yaml")],
        "tools/merge_datasets.py": ["--input", str(sample), "--output-prefix", str(tmp_path / "a")],
    }[script]
    place = "os.path.isfile" if script != "chatflow" else "megatron_chatflow.curriculum.forecast"
    start = "megatron_chatflow.__main__:main" if script == "chatflow" else script
    program = f"""
import runpy, sys
from unittest.mock import patch
import numpy as np
def bug(*a, **k):
    np.zeros(2) + np.zeros(3)
import megatron_chatflow.curriculum, megatron_chatflow.cli.corpus
sys.argv = {[script, *words]!r}
with patch({place!r}, bug):
    if ":" in {start!r}:
        from megatron_chatflow.__main__ import main
        sys.exit(main())
    runpy.run_path({start!r}, run_name="__main__")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "operands could not be broadcast together" in done.stderr


MISTAKES = ["missing", "folder", "empty", "binary", "too long a name"]


def _mistake(kind: str, folder: Path) -> Path:
    path = folder / "given"
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "binary"):
        path.write_bytes(b"\xff\xfe\x00\x80" * 100 if kind == "binary" else b"")
    return folder / ("x" * 300) if kind == "too long a name" else path


PATH_FLAGS: dict[str, Callable[[Path, str, Path], Any]] = {
    "plan --config": lambda s, p, f: command("plan", "--config", p),
    "plan --curriculum": lambda s, p, f: command(
        "plan", "--config", str(s / "run.yaml"), "--curriculum", p
    ),
    "plan --data-path": lambda s, p, f: command(
        "plan", "--config", str(s / "run.yaml"), "--curriculum", "", "--data-path", p
    ),
    "plan --tokenizer-model": lambda s, p, f: command(
        "plan", "--config", str(s / "run.yaml"), "--tokenizer-model", p
    ),
    "locate --checkpoint": lambda s, p, f: command("locate", "--checkpoint", p, "--sample", "1"),
    "evaluate --load": lambda s, p, f: command("evaluate", "--load", p),
    "generate --load": lambda s, p, f: command("generate", "--load", p, "--prompt", "a"),
    "preprocess --input": lambda s, p, f: preprocess.main(
        ["--input", p, "--output-prefix", str(f / "o"), *TOKENIZER]
    ),
    "preprocess --tokenizer-model": lambda s, p, f: preprocess.main(
        ["--input", str(QUICKSTART / "data" / "zh.jsonl"), "--output-prefix", str(f / "o")]
        + [*TOKENIZER[:3], p]
    ),
    "merge --input": lambda s, p, f: corpus.merge_main(
        ["--input", p, "--output-prefix", str(f / "o")]
    ),
    "verify": lambda s, p, f: corpus.verify_main([p]),
    "convert --load-dir": lambda s, p, f: convert.main(
        ["--load-dir", p, "--save-dir", str(f / "o")]
    ),
    "extend --input": lambda s, p, f: tokenizer.extend_main(
        [*TOKENIZER, "--input", p, "--new-tokens", "4", "--output", str(f / "o")]
    ),
    "extend --tokenizer-model": lambda s, p, f: tokenizer.extend_main(
        [*TOKENIZER[:3], p, "--input", str(QUICKSTART / "data" / "zh.jsonl")]
        + ["--new-tokens", "4", "--output", str(f / "o")]
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("flag", PATH_FLAGS)
def test_a_path_that_cannot_be_used_is_one_message(
    flag: str, kind: str, sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = PATH_FLAGS[flag](sample, str(_mistake(kind, tmp_path)), tmp_path)
    code, err = (
        (answer[0], answer[2]) if isinstance(answer, tuple) else (answer, capfd.readouterr().err)
    )
    assert code in (1, 2) and err and "Traceback" not in err, err
