"""Small Hugging Face folders of every family, as transformers itself writes them, and what a
converted run directory computes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.sample import QUICKSTART
from tests.tokenizer import samples

os.environ["HF_HUB_OFFLINE"] = "1"

SHAPE = {
    "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 9,
    "initializer_range": 0.15, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {
        "vocab_size": 4096,
        "num_key_value_heads": 9,
        "max_position_embeddings": 512,
        "dtype": "float16",
    },
    "llama3": {
        "num_key_value_heads": 3,
        "max_position_embeddings": 16384,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
    },
    "linear": {
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "mistral": {
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "rope_theta": 1000000.0,
    },
    "qwen2": {
        "vocab_size": 480,
        "num_key_value_heads": 3,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}
"""What each family has beyond SHAPE. `llama2` brings the SentencePiece model of the quickstart, the
others a byte-level BPE of 457 tokens.
"""

TEXTS = (samples.LINES[0], samples.LINES[2], samples.LINES[3], samples.LINES[5])
"""English, Chinese, Hungarian, Thai."""


def build(folder: Path, family: str, *, shard: str = "5GB", **changes: Any) -> Path:
    """Write a model of random weights, norms and biases among them, with its tokenizer; returns the
    folder.
    """
    import torch
    import transformers

    settings = SHAPE | {"vocab_size": 457} | FAMILIES[family] | changes
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    kind = {"mistral": "Mistral", "qwen2": "Qwen2"}.get(family, "Llama")
    config = getattr(transformers, kind + "Config")(
        **settings, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(7)
    model = getattr(transformers, kind + "ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder, family)
    return folder


def write_tokenizer(folder: Path, family: str, added: Sequence[str] = ()) -> None:
    """The family's tokenizer; with `added` texts as further tokens (byte-level ones only)."""
    folder.mkdir(exist_ok=True)
    if family == "llama2":
        shutil.copyfile(QUICKSTART / "tokenizer.model", folder / "tokenizer.model")
        return
    backend = samples.byte_level_bpe()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens(list(added))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder's safetensors."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def reference_logits(folder: Path, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Float32 logits of transformers, [length, vocabulary] a row of ids."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([list(row)])).logits[0].numpy() for row in rows]


def greedy(folder: Path, ids: Sequence[int], count: int) -> list[int]:
    """What transformers writes after `ids`."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def tool(*words: object) -> tuple[int, str, str]:
    """tools/convert_checkpoint.py in this process: (exit code, standard output, standard error)."""
    from megatron_chatflow.cli.convert import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def run_logits(
    run: Path, rows: Sequence[Sequence[int]], *words: str, direct: Path | None = None
) -> list[np.ndarray] | None:
    """The same logits by the run directory's checkpoint, in float32, in this launch's layout; None
    but on the last stage.

    With `direct` the weights come straight from that Hugging Face folder, and the settings alone
    from the run directory.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_chatflow.checkpoint import state_dict
    from megatron_chatflow.checkpoint.run_directory import find_checkpoint
    from megatron_chatflow.config import load_values, make_parser, parse, resolve
    from megatron_chatflow.conversion.hf_model import open_folder
    from megatron_chatflow.conversion.load_into_model import load_weights
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.model.gpt import build_model

    launch = read_launch()
    opened = open_folder(direct) if direct else None
    longest = str(max(map(len, rows)))
    flags = ["--seq-length", longest, "--train-iters", "1", "--lr", "1", "--no-bf16", *words]
    config = resolve(
        parse(make_parser("test", ""), flags, load_values(run / "config.yaml"))[0],
        launch.world_size,
    )
    process_groups.initialize(launch, config.parallel, config.model.num_layers)
    try:
        model = build_model(config, config.tokenizer.vocab_size, "local", wrap=False)
        if direct is None:
            state_dict.load(find_checkpoint(run, None), model, None)
        else:
            load_weights(opened, model)
        model[0].eval()

        def forward(iterator: Any, chunk: Any) -> Any:
            tokens = next(iterator)
            logits = chunk(
                tokens, torch.arange(tokens.shape[1])[None], None, runtime_gather_output=True
            )
            return (
                logits,
                lambda output, non_loss_data: (
                    output[0, :, : config.tokenizer.vocab_size].detach().numpy().copy()
                ),
            )

        found: list[np.ndarray] = []
        for row in rows:
            found += get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter([torch.tensor([list(row)])]),
                model=model[0],
                num_microbatches=1,
                seq_length=len(row),
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return found if parallel_state.is_pipeline_last_stage() else None
    finally:
        process_groups.shut_down()
