"""A wheel in an environment without the repository does the complete job, from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "quickstart" / "data"
SETTINGS = {
    "training": {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 3},
    "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
    "data": {"seq_length": 64, "split": "900,100,0"},
    "validation": {"eval_interval": 2, "eval_iters": 1},
    "logging": {"log_interval": 1},
}
CURRICULUM = {
    "clock": "samples",
    "domains": {
        "en": {"path": "data/en_text_document"},
        "zh": {"path": "data/zh_text_document"},
        "instruct": {"path": "data/instruct_document", "kind": "instruct"},
    },
    "stages": [
        {"name": "english", "at": 0, "weights": {"en": 1}},
        {"name": "all", "at": "50%", "weights": {"en": 0.3, "zh": 0.4, "instruct": 0.3}},
    ],
}


@pytest.fixture(scope="module")
def chatflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a wheel that is installed into an environment without the repository.

    The environment sees the packages of this one, but not the .pth files among them, which would
    lead to the repository.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(
        ROOT / "megatron_chatflow",
        source / "megatron_chatflow",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    _run([*pip, "wheel", str(source), *options, "-w", str(folder)], folder)
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], folder)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = folder.glob("*.whl")
    _run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], folder)
    shutil.rmtree(source)
    return python.parent / "chatflow"


def _run(words: list[str], folder: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        words, cwd=folder, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_wheel_does_the_complete_job_without_the_repository(
    chatflow: Path, tmp_path: Path
) -> None:
    from tests.conversion.models import build

    def run(command: str) -> str:
        return _run([str(chatflow), *command.split()], tmp_path)

    python = str(chatflow.parent / "python")
    where = _run([python, "-c", "import megatron_chatflow as m; print(m.__file__)"], tmp_path)
    assert str(chatflow.parents[1]) in where
    build(tmp_path / "model", "llama3")
    for name in ("en", "zh", "instruct"):
        shutil.copy(DATA / f"{name}.jsonl", tmp_path)
    (tmp_path / "curriculum.yaml").write_text(yaml.safe_dump(CURRICULUM), encoding="utf-8")

    tokenizer = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"
    run(f"tokenizer extend {tokenizer} model --input zh.jsonl --new-tokens 50 --output tokenizer")
    for name in ("en", "zh"):
        run(
            f"preprocess --input {name}.jsonl --output-prefix data/{name} {tokenizer} tokenizer "
            "--append-eod --workers 1"
        )
    run(
        f"preprocess --input instruct.jsonl --kind instruct --output-prefix data/instruct "
        f"{tokenizer} tokenizer --workers 2"
    )
    assert "valid" in run("corpus verify data/en_text_document data/instruct_document")
    run("convert --load-dir model --save-dir runs/base --tokenizer-folder tokenizer")
    base = yaml.safe_load((tmp_path / "runs/base/config.yaml").read_text(encoding="utf-8"))
    sections = base | {name: base.get(name, {}) | values for name, values in SETTINGS.items()}
    sections["tokenizer"]["tokenizer_model"] = str(tmp_path / "tokenizer")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")

    settings = "--config run.yaml --curriculum curriculum.yaml"
    assert "stage english" in run(f"plan {settings}")
    run(f"train {settings} --load runs/base --finetune --save runs/zh")
    assert (tmp_path / "runs/zh/latest_checkpointed_iteration.txt").read_text().strip() == "3"
    losses = json.loads(run("evaluate --load runs/zh --json"))["validation"]
    assert {"en", "zh"} <= set(losses)
    assert run("generate --load runs/zh --prompt A --max-new-tokens 4").strip()
    run("convert --load-dir runs/zh --save-dir out")
    assert (tmp_path / "out" / "config.json").is_file()
    run("plot runs/zh")
    assert run("compare runs/zh runs/zh").startswith("the same")
    assert "_shtab_chatflow" in run("completion bash")
