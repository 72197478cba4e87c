"""The public API: lazy names, and the examples of docs/api.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_chatflow
from tests.sample import QUICKSTART

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def example(section: str) -> str:
    """Return the program of a section of the page."""
    (found,) = re.findall(rf"^## {section}\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    return found


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, megatron_chatflow; print({'torch', 'numpy', 'yaml'} & set(sys.modules))"
    assert run(code, ROOT).strip() == "set()"


def test_every_public_name_is_documented_and_exists() -> None:
    documented = re.findall(r"^\| \[`(\w+)`\]", PAGE, re.MULTILINE)
    assert sorted(documented) == sorted(megatron_chatflow.__all__)
    assert set(megatron_chatflow.__all__) <= set(dir(megatron_chatflow))
    for name in documented:
        assert callable(getattr(megatron_chatflow, name)), name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'open_blends'"):
        _ = megatron_chatflow.open_blends


def test_blend_example_runs(sample: Path) -> None:
    printed = run(example("The blend"), sample).splitlines()
    assert len(re.findall(r"'(en|zh|en-zh|instruct)'", printed[0])) == 8
    assert printed[1].startswith("(64,) ")


def test_tokenizer_example_runs(tmp_path: Path) -> None:
    shutil.copy(QUICKSTART / "tokenizer.model", tmp_path)
    assert " The file is open. 4096 2" in run(example("Tokenizers"), tmp_path)


@pytest.mark.slow
def test_training_evaluation_and_generation_examples_run(sample: Path) -> None:
    shutil.rmtree(sample / "runs" / "api", ignore_errors=True)
    assert "gradient norm of iteration 4 " in run(example("Training"), sample)
    printed = run(example("Evaluation and generation"), sample)
    assert {line.split()[0] for line in printed.splitlines()[:4]} == {
        "en",
        "zh",
        "en-zh",
        "instruct",
    }


@pytest.mark.slow
def test_conversion_example_runs(tmp_path: Path) -> None:
    from tests.conversion.models import build

    build(tmp_path / "SmolLM2-135M", "llama3")
    run(example("Conversion"), tmp_path)
    assert (tmp_path / "SmolLM2-135M-again" / "config.json").exists()
