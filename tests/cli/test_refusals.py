"""What cannot work is refused at once: a message per error, exit code 2, nothing written."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sample import CURRICULUM, SETTINGS


def _edit(folder: Path, name: str, change: Any) -> None:
    path = folder / name
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")


def _curriculum(change: Any) -> Any:
    return lambda folder: _edit(folder, "curriculum.yaml", change)


def _settings(change: Any) -> Any:
    return lambda folder: _edit(folder, "run.yaml", change)


def _truncate(folder: Path) -> None:
    path = folder / "zh_text_document.bin"
    path.write_bytes(path.read_bytes()[:-100])


CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "a missing corpus": (
        lambda f: (f / "zh_text_document.bin").unlink(),
        [],
        ["zh", "zh_text_document"],
    ),
    "a truncated corpus": (_truncate, [], ["zh", "zh_text_document.bin"]),
    "a cut index": (
        lambda f: (f / "zh_text_document.idx").write_bytes(b"MMIDIDX\0\0"),
        [],
        ["zh", "zh_text_document.idx"],
    ),
    "a negative weight": (
        _curriculum(lambda c: c["stages"][0]["weights"].update(en=-1)),
        [],
        ["curriculum.yaml", "en", "-1"],
    ),
    "an unknown key in the curriculum": (
        _curriculum(lambda c: c.update(clok="samples")),
        [],
        ["curriculum.yaml", "clok", "clock"],
    ),
    "an unknown key in the settings": (
        _settings(lambda s: s["model"].update(num_layer=2)),
        [],
        ["run.yaml", "num_layer", "num_layers"],
    ),
    "an unknown ramp": (
        _curriculum(lambda c: c["stages"][1].update(ramp="linaer")),
        [],
        ["linaer", "linear"],
    ),
    "heads that TP does not divide": (
        None,
        ["--tensor-model-parallel-size", "3"],
        ["num_attention_heads 4", "tensor_model_parallel_size 3"],
    ),
    "a vocabulary smaller than the tokenizer's": (
        None,
        ["--vocab-size", "1000"],
        ["vocab_size 1000", "4096"],
    ),
    "another tokenizer than the corpora's": (
        None,
        ["--tokenizer-type", "ByteLevelTokenizer", "--tokenizer-model", "x"],
        ["tokenizer"],
    ),
    "a missing curriculum": (lambda f: (f / "curriculum.yaml").unlink(), [], ["curriculum.yaml"]),
    "a domain read more often than allowed": (
        _curriculum(
            lambda c: (
                c["domains"]["en"].update(max_epochs=1),
                c.update(stages=[{"name": "a", "at": 0, "weights": {"en": 1}}]),
            )
        ),
        ["--train-iters", "100000"],
        ["en", "max_epochs"],
    ),
    "no validation part under evaluation": (
        None,
        ["--data-path", "x", "--curriculum", "curriculum.yaml"],
        ["curriculum", "data_path"],
    ),
    "a warm-up longer than the run": (None, ["--lr-warmup-iters", "30"], ["warm-up"]),
    "transformer engine without a GPU": (
        None,
        ["--transformer-impl", "transformer_engine"],
        ["transformer_engine", "no CUDA device"],
    ),
    "a checkpoint that is not there": (
        None,
        ["--load", "nowhere", "--ckpt-step", "5"],
        ["nowhere", "--ckpt-step"],
    ),
    "finetuning from nothing": (None, ["--load", "nowhere", "--finetune"], ["nowhere"]),
}


@pytest.fixture(scope="module")
def copy(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    for path in sample.glob("*_document.*"):
        shutil.copy(path, folder)
    return folder


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_messages(copy: Path, tmp_path: Path, name: str) -> None:
    change, words, parts = CASES[name]
    folder = tmp_path / "run"
    shutil.copytree(copy, folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    (folder / "curriculum.yaml").write_text(yaml.safe_dump(CURRICULUM), encoding="utf-8")
    if change:
        change(folder)
    before = _files(folder)
    begin = _seconds_of_children()
    call = [
        sys.executable,
        "-m",
        "megatron_chatflow",
        "train",
        "--config",
        "run.yaml",
        "--save",
        "saved",
        *words,
    ]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=60)
    seconds = _seconds_of_children() - begin
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert all(line.startswith("chatflow train: error: ") for line in lines), done.stderr
    for part in parts:
        assert part in done.stderr
    assert _files(folder) == before
    assert seconds < 20


def test_an_unknown_command_names_the_nearest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_chatflow", "trian"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "") and "did you mean train?" in done.stderr


def test_help_and_version_answer_at_once_and_load_neither_numpy_nor_torch() -> None:
    code = (
        "import sys, megatron_chatflow.__main__ as m; m.main(['--help']); m.main(['--version']); "
    )
    code += "print(sorted({'numpy', 'torch', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "chatflow <command>" in done.stdout and done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize(
    "command", ["train", "plan", "locate", "evaluate", "generate", "doctor", "submit"]
)
def test_every_command_has_help_that_needs_no_torch(command: str) -> None:
    code = (
        f"import sys\nfrom megatron_chatflow.__main__ import main\ntry: main([{command!r}, "
        f"'--help'])\nexcept SystemExit: pass\n"
    )
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"chatflow {command}" in done.stdout and done.stdout.rstrip().endswith("False")
