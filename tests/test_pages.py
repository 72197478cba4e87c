"""Every command of README.md and docs/ has flags that exist, and runs, in order."""

from __future__ import annotations

import gzip
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

from megatron_chatflow.planner.laws.forms import JOINT
from megatron_chatflow.planner.laws.run_table import write_table
from tests import pages, sample
from tests.planner.laws import mixtures, tables

CASES = [(page, line) for page in pages.PAGES for line in pages.command_lines(page)]


@cache
def help_of(*start: str) -> str:
    program, flag = [sys.executable, *start[1:]], "--help"
    if start[0] == "chatflow":
        program[1:1], flag = ["-m", "megatron_chatflow"], "--help-all"
    done = subprocess.run([*program, flag], cwd=pages.ROOT, capture_output=True, text=True)
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
def test_every_reason_not_to_run_is_used(rule: str) -> None:
    assert any(re.fullmatch(rule, line) for _, line in CASES)


SIZES = {
    "training": {"micro_batch_size": 1, "global_batch_size": 8, "train_iters": 6, "ema_decay": 0.9},
    "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
    "data": {"seq_length": 64, "split": "900,100,0"},
    "checkpoint": {"save_interval": 1},
    "validation": {"eval_iters": 2, "eval_interval": 2},
}


class Walk:
    """A folder in which the commands of pages run one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first_training = ""
        self.base_evaluation: dict[str, dict[str, float]] = {}

    @classmethod
    def of_files(cls, folder: Path) -> Walk:
        """Make a walk in `folder`, with the files that README.md assumes a user has."""
        from tests.conversion.models import build

        build(folder / "SmolLM2-135M", "llama3")
        for name in ("tools", "examples"):
            (folder / name).symlink_to(pages.ROOT / name)
        for language in ("en", "zh"):
            shutil.copy(sample.QUICKSTART / "data" / f"{language}.jsonl", folder)
        block = re.search(
            r"^    clock: .*\n(?:    .*\n)+", (pages.ROOT / "README.md").read_text(), re.M
        )
        assert block is not None
        (folder / "curriculum.yaml").write_text(block.group(), encoding="utf-8")
        programs = folder / "bin"
        programs.mkdir()
        # sbatch belongs to the cluster: here it checks the syntax of the script, prints a number.
        for name, script in {
            "chatflow": f'exec {sys.executable} -m megatron_chatflow "$@"',
            "python": f'exec {sys.executable} "$@"',
            "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
            "sbatch": 'bash -n "$2" && echo 1234',
        }.items():
            (programs / name).write_text(f"#!/bin/bash\n{script}\n")
            (programs / name).chmod(0o755)
        return cls(folder)

    def run(self, command: str) -> str:
        """Run one command and return its output."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | {
            "PATH": path,
            "PYTHONPATH": str(pages.ROOT),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def prepare(self, command: str) -> None:
        """Write the files that a command needs and the page does not mention."""
        if "sweep.yaml" in command:
            sizes = {"small": {}, "large": {"lr": 5e-4}}
            content = {"base": "run.yaml", "curriculum": "curriculum.yaml", "runs": "runs/sweep"}
            content |= {"sizes": sizes, "tokens": [2048, 4096], "shares": {"zh": {"zh": 1}}}
            (self.folder / "sweep.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        if "--config run.yaml" in command and not (self.folder / "run.yaml").exists():
            model = yaml.safe_load(
                (self.folder / "runs/base/config.yaml").read_text(encoding="utf-8")
            )
            tokenizer = model["tokenizer"]
            tokenizer["tokenizer_model"] = str(
                self.folder / "runs/base" / tokenizer["tokenizer_model"]
            )
            both = model | SIZES | {"training": model["training"] | SIZES["training"]}
            (self.folder / "run.yaml").write_text(yaml.safe_dump(both), encoding="utf-8")
            for name, (prefix, extra) in sample.DOMAINS.items():
                if name != "zh":
                    words = [*extra, *([] if name == "instruct" else ["--append-eod"])]
                    quoted = " ".join(f"$'{word}'".replace("\n", "\\n") for word in words)
                    self.run(
                        f"python tools/preprocess_data.py --input "
                        f"{sample.QUICKSTART}/data/{name}.jsonl --output-prefix "
                        f"data/{prefix.split('_')[0]} --tokenizer-type HuggingFaceTokenizer "
                        f"--tokenizer-model tokenizer-zh {quoted}"
                    )

    def run_page(self, page: str) -> list[str]:
        """Run the commands of a page in order and return those that ran."""
        commands = [
            pages.smaller(line) for line in pages.command_lines(page) if not pages.why_not_run(line)
        ]
        for command in commands:
            self.prepare(command)
            self.run(command)
            if "megatron_chatflow train" in command and not self.first_training:
                self.first_training = command
                self.base_evaluation = self.evaluation_of_the_base()
        return commands

    def evaluation_of_the_base(self) -> dict[str, dict[str, float]]:
        """Return the losses of the run's first model on the run's validation sets."""
        return json.loads(
            self.run("chatflow evaluate --load runs/zh --reference runs/base --json")
        )["reference"]["validation"]

    def add_files_of_the_docs(self) -> None:
        """Write the files that the pages of docs/ name and the README's walk does not make."""
        folder, data = self.folder, sample.QUICKSTART / "data"
        for language in ("en", "zh"):
            with gzip.open(folder / f"{language}.jsonl.gz", "wb") as file:
                file.write((data / f"{language}.jsonl").read_bytes())
            few = (
                (data / f"{language}.jsonl")
                .read_text(encoding="utf-8")
                .splitlines(keepends=True)[:20]
            )
            (folder / f"{language}.jsonl").write_text("".join(few), encoding="utf-8")
        shutil.copy(folder / "en.jsonl", folder / "held_out_en.jsonl")
        (folder / "held_out_zh.txt").write_text("\u6587\u4ef6\n" * 200, encoding="utf-8")
        (folder / "prompts.jsonl").write_text(
            '{"prompt": "The file"}\n{"prompt": "A"}\n', encoding="utf-8"
        )
        runs = tables.grid(kinds=("scratch", "continued"))
        write_table(
            folder / "runs.csv", tables.measured(JOINT, tables.JOINT_LAW, runs, noise=0.003)
        )
        write_table(folder / "mixtures.csv", mixtures.runs())
        shutil.copytree(folder / "tokenizer-zh", folder / "smollm2-zh-tokenizer")
        (folder / "mistral").mkdir()
        for place in (folder / "mistral", folder):
            shutil.copy(sample.QUICKSTART / "tokenizer.model", place / "tokenizer.model")
        (folder / "parts").mkdir()
        for name in ("a", "b"):
            for suffix in (".bin", ".idx", ".json"):
                shutil.copy(
                    folder / f"data/zh_text_document{suffix}",
                    folder / f"parts/{name}_text_document{suffix}",
                )


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """A folder in which every command of README.md has run."""
    walk = Walk.of_files(tmp_path_factory.mktemp("walk"))
    walk.run_page("README.md")
    walk.add_files_of_the_docs()
    return walk


@pytest.mark.slow
def test_the_run_of_the_readme_starts_from_the_converted_model(readme: Walk) -> None:
    assert "--load runs/base --finetune" in readme.first_training
    records = (readme.folder / "runs/zh/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = next(r["validation"] for r in map(json.loads, records) if "validation" in r)
    assert first
    for name, value in first.items():
        assert value["loss"] == pytest.approx(readme.base_evaluation[name]["loss"], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in pages.PAGES
        if page != "README.md" and not all(map(pages.why_not_run, pages.command_lines(page)))
    ],
)
def test_the_commands_of_a_page_run_in_order(readme: Walk, tmp_path: Path, page: str) -> None:
    folder = tmp_path / "walk"
    shutil.copytree(readme.folder, folder, symlinks=True)
    Walk(folder).run_page(page)


@pytest.mark.parametrize("page", [*pages.PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_paths_on_the_pages_exist(page: str) -> None:
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])(?:\w[\w-]*/)+[\w-]*\.(?:py|sh|sbatch|yaml)\b", text))
    roots = {path.name for path in pages.ROOT.iterdir()}
    ours = {path for path in named if path.split("/")[0] in roots}
    assert sorted(path for path in ours if not (pages.ROOT / path).exists()) == []
    inside = {path.parent.name for path in (pages.ROOT / "megatron_chatflow").rglob("*.py")} - roots
    assert sorted(path for path in named if path.split("/")[0] in inside) == []
