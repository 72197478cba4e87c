"""docs/curriculum.md says what is so: its file is read, its program runs, its formulas are the
ramps.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_chatflow.curriculum import load_curriculum
from megatron_chatflow.curriculum.ramps import pacing

PAGE = (Path(__file__).parents[1] / "docs" / "curriculum.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_file_is_read_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "curriculum.yaml").write_text(block("yaml"), encoding="utf-8")
    c = load_curriculum(tmp_path / "curriculum.yaml")
    assert list(c.domains) == ["en", "zh", "en-zh", "instruct"] and list(c.validation) == [
        "news",
        "chat",
    ]
    assert c.domains["en"].valid == str(tmp_path / "data" / "en_heldout_text_document")
    keys = set(
        re.findall(
            r"^\| `(?:domains\.NAME\.|stages\[\]\.)?(\w+)(?:\.NAME)?` \|",
            PAGE.split("## Ramps")[0],
            re.MULTILINE,
        )
    )
    assert keys == {
        "clock",
        "path",
        "kind",
        "train_on_prompt",
        "max_epochs",
        "valid",
        "name",
        "at",
        "weights",
        "ramp",
        "preset",
        "on_exhausted",
        "validation",
    }


@pytest.mark.parametrize("ramp", ["step", "linear", "cosine", "root2", "root3.5", "geometric"])
def test_the_formulas_are_the_ramps(ramp: str) -> None:
    rows = dict(
        re.findall(
            r"^\| `(\w+)[^|]*` ?[^|]*\| ([^|]+) \|",
            PAGE.split("## Ramps")[1].split("## What")[0],
            re.MULTILINE,
        )
    )
    power = ramp.removeprefix("root")
    formula = (
        rows["root" if ramp.startswith("root") else ramp]
        .replace("^", "**")
        .replace("1/p", f"1/{power}")
    )
    formula = {"step": "0"}.get(ramp, re.sub(r"(\d|pi) (s|\()", r"\1 * \2", formula))
    pace = pacing(ramp, 1000)
    for s in np.linspace(0, 0.999, 77):
        assert float(pace.at(np.asarray(1000 * s))) == pytest.approx(
            eval(formula, {"s": s, "pi": math.pi, "cos": math.cos}), abs=2e-3
        )


def test_the_program_runs_in_the_folder_of_a_curriculum(sample: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block("python")],
        cwd=sample,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second, origin = done.stdout.splitlines()
    assert len(re.findall(r"'(en|zh|en-zh|instruct)'", first)) == 8
    assert float(second.rpartition("]")[2]) < float(first.rpartition("]")[2]) < math.log(4096)
    assert origin.startswith("{'domain': ") and "'documents': [(" in origin
