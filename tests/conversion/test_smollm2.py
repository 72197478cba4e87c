"""The real model: SmolLM2-135M out of a package, converted, held against transformers in four
languages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_chatflow.tokenizer import load_tokenizer
from tests.conversion.models import TEXTS, greedy, reference_logits, run_logits, tensors
from tests.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2-run") / "run"
    done = subprocess.run(
        [sys.executable, TOOL, "--load-dir", smollm2, "--save-dir", target],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_logits_are_those_of_transformers_on_every_layout(
    pool: Pool, smollm2: Path, run: Path
) -> None:
    """Logits reach 40, where float32 is that coarse: transformers differs from itself in float64,
    and between its kinds of attention, by 9e-5.
    """
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=smollm2)
    rows = [tokenizer.encode(text) for text in TEXTS]
    wanted = reference_logits(smollm2, rows)
    for world, words in (
        (1, ()),
        (3, ("--tensor-model-parallel-size", "3")),
        (2, ("--pipeline-model-parallel-size", "2")),
    ):
        found = next(
            answer
            for answer in pool.run(world, run_logits, run, rows, *words)
            if answer is not None
        )
        worst = [float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True)]
        print(
            f"SmolLM2-135M, {' '.join(words) or 'one process'}: largest differences of "
            f"logits {worst}"
        )
        assert max(worst) < 1e-4


def test_back_again_every_tensor_is_the_same_and_the_text_as_well(
    smollm2: Path, run: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back"
    done = subprocess.run(
        [sys.executable, TOOL, "--load-dir", run, "--save-dir", back],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    before, after = tensors(smollm2), tensors(back)
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert json.loads((smollm2 / name).read_text()) == json.loads((back / name).read_text()), (
            name
        )
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=back)
    ids = tokenizer.encode("The capital of France is")
    text = tokenizer.decode(greedy(back, ids, 8))
    assert text == tokenizer.decode(greedy(smollm2, ids, 8)) and "Paris" in text


def test_after_extension_the_logits_of_the_old_tokens_are_the_same_bit_for_bit(
    pool: Pool, smollm2: Path, run: Path, tmp_path: Path
) -> None:
    """Eight thousand tokens of two Chinese characters, each with the row that the pieces of its
    text give.
    """
    import hashlib

    import tokenizers

    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=smollm2)
    texts = [chr(0x4E00 + i) + chr(0x4E01 + i) for i in range(8000)]
    extended = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert extended.add_tokens(texts) == len(texts)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    extended.save(str(folder / "tokenizer.json"))
    shutil.copyfile(smollm2 / "tokenizer_config.json", folder / "tokenizer_config.json")
    first, pieces = tokenizer.vocab_size, [tokenizer.encode(text) for text in texts]
    new = [
        {"id": first + i, "pieces": ids, "chars": [2 / len(ids)] * len(ids)}
        for i, ids in enumerate(pieces)
    ]
    token_map = {
        "version": 1,
        "kind": "extend",
        "base_vocab_size": first,
        "vocab_size": first + len(new),
        "new": new,
    }
    token_map["base_sha256"] = hashlib.sha256((smollm2 / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "token_map.json").write_text(json.dumps(token_map))
    target = tmp_path / "run"
    call = [
        sys.executable,
        TOOL,
        "--load-dir",
        smollm2,
        "--save-dir",
        target,
        "--tokenizer-folder",
        folder,
    ]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [tokenizer.encode(text) for text in TEXTS]
    (before,), (after,) = (pool.run(1, run_logits, folder, rows) for folder in (run, target))
    assert all(
        b.shape[1] == first + 8000 and np.array_equal(a, b[:, :first])
        for a, b in zip(before, after, strict=True)
    )


PEAK = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
from megatron_chatflow.cli.convert import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def write_large(folder: Path, layers: int) -> int:
    """A LLaMA of random bfloat16 weights, a file for the embeddings and one for every four layers;
    returns its bytes.
    """
    import torch
    from safetensors.torch import save_file

    from tests.conversion.models import write_tokenizer

    hidden, ffn, kv, vocab = 2048, 5632, 256, 32000
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        # fmt: skip
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    files = [
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "lm_head.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for first in range(0, layers, 4):
        files.append(
            {
                f"model.layers.{i}.{name}.weight": shape
                for i in range(first, min(first + 4, layers))
                for name, shape in shapes.items()
            }
        )
    write_tokenizer(folder, "llama3")
    places = {}
    for i, names in enumerate(files):
        save_file(
            {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in names.items()},
            folder / f"model-{i}.safetensors",
        )
        places |= dict.fromkeys(names, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        # fmt: skip
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_a_large_model_is_never_completely_in_memory(tmp_path: Path) -> None:
    """The same peak for 1.3 and for 3.3 GB of weights, but for what is another file's worth on the
    way back.
    """
    peaks, sizes = [], []
    for layers in (12, 34):
        folder = tmp_path / f"hf-{layers}"
        sizes.append(write_large(folder, layers))
        for load, save in (
            (folder, tmp_path / f"run-{layers}"),
            (tmp_path / f"run-{layers}", tmp_path / f"back-{layers}"),
        ):
            call = [
                sys.executable,
                "-c",
                PEAK,
                str(ROOT),
                "--load-dir",
                str(load),
                "--save-dir",
                str(save),
            ]
            done = subprocess.run(call, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr
            peaks.append(int(done.stdout.split("peak ")[1]))
            shutil.rmtree(load)
        print(
            f"{sizes[-1] / 1e9:.2f} GB of weights: peak {peaks[-2] / 1e9:.2f} GB in, "
            f"{peaks[-1] / 1e9:.2f} GB back"
        )
        shutil.rmtree(tmp_path / f"back-{layers}")
    assert sizes[1] > 2 * sizes[0]
    assert peaks[2] < peaks[0] + 0.1e9 and peaks[2] < 0.5 * sizes[1]
    assert peaks[3] < peaks[1] + 1.1e9 and peaks[3] < sizes[1]
