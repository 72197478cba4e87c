"""The CPU file takes effect only when it is installed, only without CUDA, and only on calls that
name CUDA.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pool import Pool

BODY = """
import torch
{before}
from megatron_chatflow.distributed import cuda_shim
before = torch.empty, torch.Tensor.to, torch.cuda.current_device
cuda_shim.install(); cuda_shim.install()
after = torch.empty, torch.Tensor.to, torch.cuda.current_device
print(before == after)
if before != after:
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    engine = {{"torch": torch, "__name__": "megatron.core.optimizer"}}
    assert eval("torch.zeros(2).type()", engine) == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type(torch.int64).dtype == torch.int64
    assert after[0].__wrapped__ is before[0], "installed once"
"""

OTHERS = """
import copy, json, pickle, sys
import torch

def add(x):
    return x + torch.zeros(2) + torch.full((2,), 2.0).to(torch.float32)

def in_context(name, *args):
    with torch.device("meta"):
        return str(getattr(torch, name)(*args).device)

def by_default():
    torch.set_default_device("meta")
    try:
        made = [torch.arange(3), torch.tensor([1]), torch.linspace(0, 1, 3), torch.eye(2)]
        return [str(t.device) for t in (*made, torch.nn.Linear(2, 2).weight)]
    finally:
        torch.set_default_device(None)

def seeds():
    torch.manual_seed(1)
    with torch.random.fork_rng():
        torch.rand(3)
    return torch.nn.init.normal_(torch.empty(2)).tolist()

def seen_by_subclass():
    seen = []
    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            known = torch.zeros_like, torch.Tensor.to, torch.Tensor.type
            seen.extend(str(one) for one in known if func is one)
            return super().__torch_function__(func, types, args, kwargs or {})
    t = torch.ones(2).as_subclass(Seen)
    torch.zeros_like(t), t.to(torch.float64), t.type(torch.int32)
    return len(seen)

if "install" in sys.argv:
    from megatron_chatflow.distributed import cuda_shim
    cuda_shim.install()
print(json.dumps({
    "context": [
        in_context(name, 2)
        for name in (
            "empty", "zeros", "ones", "rand", "randn", "arange", "randperm", "tensor", "as_tensor"
        )
    ],
    "context of shapes": [
        in_context("full", (2,), 1.0),
        in_context("randint", 3, (2,)),
        in_context("linspace", 0, 1, 2),
    ],
    "default": by_default(),
    "seeds": seeds(),
    "types": [
        torch.zeros(2).type(),
        torch.zeros(2).bfloat16().type(),
        torch.zeros(2).type("torch.DoubleTensor").type(),
    ],
    "script": torch.jit.script(add)(torch.ones(2)).tolist(),
    "compile": torch.compile(add, backend="eager", fullgraph=True)(torch.ones(2)).tolist(),
    "pickle": [
        pickle.loads(pickle.dumps(torch.zeros))(2).tolist(),
        copy.deepcopy(torch.tensor)([1.0]).tolist(),
    ],
    "subclasses": seen_by_subclass(),
    "devices": [
        torch.cuda.is_available(),
        torch.cuda.device_count(),
        torch.accelerator.is_available(),
    ],
    "meta": str(torch.nn.Linear(2, 2).to("meta").weight.device),
}))
"""


def run(before: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", BODY.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_on_a_cpu_cuda_calls_land_on_the_cpu_after_install() -> None:
    assert run("") == "False"


def test_on_a_cuda_machine_install_changes_nothing() -> None:
    assert run("torch.cuda.is_available = lambda: True") == "True"


def test_calls_that_do_not_name_cuda_behave_as_without_the_layer(tmp_path: Path) -> None:
    (tmp_path / "others.py").write_text(OTHERS)  # TorchScript reads a function's source
    without, installed = (
        json.loads(
            subprocess.run(
                [sys.executable, tmp_path / "others.py", *words],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for words in ([], ["install"])
    )
    assert without["context"][0] == "meta"
    assert installed == without


def _logits(folder: Path) -> dict[str, list]:
    """Of a rank of the pool, where the layer is installed."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        "logits": model(torch.arange(12)[None]).logits.tolist(),
        "inv_freq": model.model.rotary_emb.inv_freq.tolist(),
    }


def test_transformers_loads_the_same_model_after_install(pool: Pool, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(5)
    saved = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **shape, rope_parameters={"rope_type": "default", "rope_theta": 7e3}
        )
    )
    saved.save_pretrained(tmp_path / "model")
    (found,) = pool.run(1, _logits, tmp_path / "model")
    assert found["inv_freq"] == saved.model.rotary_emb.inv_freq.tolist()
    assert found["logits"] == saved.eval()(torch.arange(12)[None]).logits.tolist()
