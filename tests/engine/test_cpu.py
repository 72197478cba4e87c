"""The CPU file takes effect only when it is installed, and only without CUDA."""

from __future__ import annotations

import subprocess
import sys

BODY = """
import torch
{before}
from megatron_chatflow.engine import cpu
before = torch.empty, torch.Tensor.to, torch.cuda.current_device
cpu.install(); cpu.install()
after = torch.empty, torch.Tensor.to, torch.cuda.current_device
print(before == after)
if before != after:
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type(torch.int64).dtype == torch.int64
    assert after[0].__wrapped__ is before[0], "installed once"
"""


def run(before: str) -> str:
    return subprocess.run([sys.executable, "-c", BODY.format(before=before)], capture_output=True, text=True, check=True).stdout.strip()


def test_on_a_cpu_cuda_calls_land_on_the_cpu_after_install() -> None:
    assert run("") == "False"


def test_on_a_cuda_machine_install_changes_nothing() -> None:
    assert run("torch.cuda.is_available = lambda: True") == "True"
