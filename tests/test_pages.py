"""Every command of README.md and docs/ has flags that exist, and those that can run do, in order."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests import pages, sample

CASES = [(page, line) for page in pages.PAGES for line in pages.command_lines(page)]


@cache
def help_of(*start: str) -> str:
    program = [sys.executable, *start[1:]]
    if start[0] == "chatflow":
        program[1:1] = ["-m", "megatron_chatflow"]
    done = subprocess.run([*program, "--help"], cwd=pages.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_are_found_on_the_pages() -> None:
    found = {page for page, _ in CASES}
    assert {"README.md", "docs/corpora.md", "docs/evaluation.md", "docs/clusters.md"} <= found
    assert sum(page == "README.md" for page, _ in CASES) > 10


@pytest.mark.parametrize("page", pages.PAGES)
def test_commands_are_shell_and_their_flags_exist(page: str) -> None:
    lines = pages.command_lines(page)
    done = subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for line in lines:
        if (found := pages.program_and_flags(line)) is not None:
            known = set(re.findall(r"--[\w-]+", help_of(*found[0])))
            assert set(found[1]) <= known, line


@pytest.mark.parametrize("rule", pages.NOT_RUN)
def test_no_reason_not_to_run_is_left_over(rule: str) -> None:
    assert any(re.fullmatch(rule, line) for _, line in CASES)


SIZES = {
    "training": {"micro_batch_size": 1, "global_batch_size": 8, "train_iters": 6},
    "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
    "data": {"seq_length": 64, "split": "900,100,0"},
    "checkpoint": {"save_interval": 2},
    "validation": {"eval_iters": 2, "eval_interval": 2},
}


class Walk:
    """A folder in which the commands of pages are run one after the other."""

    def __init__(self, folder: Path) -> None:
        from tests.conversion.models import build

        self.folder = folder
        build(folder / "SmolLM2-135M", "llama3")
        for name in ("tools", "examples"):
            (folder / name).symlink_to(pages.ROOT / name)
        for language in ("en", "zh"):
            shutil.copy(sample.QUICKSTART / "data" / f"{language}.jsonl", folder)
        block = re.search(r"^    clock: .*\n(?:    .*\n)+", (pages.ROOT / "README.md").read_text(), re.M)
        assert block is not None
        (folder / "curriculum.yaml").write_text(block.group(), encoding="utf-8")
        programs = folder / "bin"
        programs.mkdir()
        # sbatch belongs to the cluster: here it reads the script as bash does, and gives a number.
        for name, script in {
            "chatflow": f'exec {sys.executable} -m megatron_chatflow "$@"',
            "python": f'exec {sys.executable} "$@"',
            "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
            "sbatch": 'bash -n "$2" && echo 1234',
        }.items():
            (programs / name).write_text(f"#!/bin/bash\n{script}\n")
            (programs / name).chmod(0o755)

    def run(self, command: str) -> str:
        """Run one command; returns what it prints."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(pages.ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def prepare(self, command: str) -> None:
        """Write what a command needs and the page says nothing of."""
        if "--config run.yaml" in command and not (self.folder / "run.yaml").exists():
            model = yaml.safe_load((self.folder / "runs/base/config.yaml").read_text(encoding="utf-8"))
            tokenizer = model["tokenizer"]
            tokenizer["tokenizer_model"] = str(self.folder / "runs/base" / tokenizer["tokenizer_model"])
            both = model | SIZES | {"training": model["training"] | SIZES["training"]}
            (self.folder / "run.yaml").write_text(yaml.safe_dump(both), encoding="utf-8")
            for name, (prefix, extra) in sample.DOMAINS.items():
                if name != "zh":
                    words = [*extra, *([] if name == "instruct" else ["--append-eod"])]
                    quoted = " ".join(f"$'{word}'".replace("\n", "\\n") for word in words)
                    self.run(
                        f"python tools/preprocess_data.py --input {sample.QUICKSTART}/data/{name}.jsonl --output-prefix "
                        f"data/{prefix.split('_')[0]} --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer-zh {quoted}"
                    )


@pytest.mark.slow
def test_the_readme_s_run_starts_from_the_converted_model_and_every_command_works(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    trained = 0
    for line in pages.command_lines("README.md"):
        if pages.why_not_run(line):
            continue
        command = pages.smaller(line)
        walk.prepare(command)
        walk.run(command)
        if "megatron_chatflow train" in command and not trained:
            trained += 1
            records = (tmp_path / "runs/zh/metrics.jsonl").read_text(encoding="utf-8").splitlines()
            first = next(r["validation"] for r in map(json.loads, records) if "validation" in r)
            answer = json.loads(walk.run("chatflow evaluate --load runs/zh --reference runs/base --json"))
            base = answer["reference"]["validation"]
            for name, value in first.items():
                assert value["loss"] == pytest.approx(base[name]["loss"], rel=1e-4), name
    assert trained == 1
