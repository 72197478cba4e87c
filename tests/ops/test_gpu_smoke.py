"""examples/gpu_smoke: how it judges, and that its stored values are those of this code."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "gpu_smoke"


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("smoke", FOLDER / "smoke.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_case_has_ten_stored_values_from_the_portable_layers(smoke: ModuleType) -> None:
    stored = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))["cases"]
    assert list(stored) == list(smoke.CASES)
    for case in stored.values():
        assert (
            case["layers"] == "local on cpu"
            and len(case["lm loss"]) == len(case["grad-norm"]) == 10
        )


def test_a_case_agrees_up_to_its_tolerance_and_no_further(smoke: ModuleType) -> None:
    reference = {"lm loss": [8.0] * 10, "grad-norm": [2.0] * 10}

    def verdict(loss: dict[int, float], norm: dict[int, float]) -> str:
        result = {
            key: [offs.get(i, 0.0) + value for i, value in enumerate(reference[key])]
            for key, offs in (("lm loss", loss), ("grad-norm", norm))
        }
        return smoke.judge(result, reference, {"first": 0.001, "loss": 0.01, "grad-norm": 0.05})[
            "verdict"
        ]

    assert verdict({0: 0.0009, 9: -0.009}, {2: 0.09, 3: 1.0}) == "agrees"
    assert (
        verdict({0: 0.0011}, {}) == verdict({9: -0.011}, {}) == verdict({}, {2: 0.11}) == "DIFFERS"
    )
    assert verdict({5: math.nan}, {}) == verdict({}, {0: math.inf}) == "DIFFERS"
    assert (
        smoke.judge({"refused": "x"}, reference, {})["verdict"] == "refused"
        and smoke.judge({"failed": "x"}, reference, {})["verdict"] == "failed"
    )


@pytest.mark.slow
def test_the_stored_values_are_those_of_this_code_and_a_wrong_mask_is_found(tmp_path: Path) -> None:
    for name in ("examples/quickstart", "examples/gpu_smoke", "megatron_chatflow", "tools"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("out", "__pycache__")
        )
    call = [sys.executable, tmp_path / "examples" / "gpu_smoke" / "smoke.py", "--case", "fp32"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(
        (tmp_path / "examples" / "gpu_smoke" / "out" / "report.json").read_text(encoding="utf-8")
    )
    assert (
        report["cases"]["fp32"]["off"]["loss"] < 1e-4
        and report["doctor"][-1] == "training: can run"
    )
    settings = tmp_path / "examples" / "gpu_smoke" / "run.yaml"
    settings.write_text(
        settings.read_text(encoding="utf-8").replace(
            "reset_attention_mask: true", "reset_attention_mask: false"
        ),
        encoding="utf-8",
    )
    done = subprocess.run(call, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "DIFFERS" in done.stdout, done.stdout + done.stderr
