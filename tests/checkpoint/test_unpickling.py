"""No file of a user's goes to a reader that runs what it says, whatever opens it."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_chatflow.errors import ChatflowError
from tests.checkpoint.crafted import Evil, write_small
from tests.checkpoint.test_crafted_checkpoints import convert
from tests.pool import Pool, command
from tests.sample import QUICKSTART, train
from tests.tokenizer import samples

SHORTEST = 16
"""Bytes; what is shorter may be part of a file by chance, and is too short to run anything."""


@contextmanager
def recorded(*folders: Path) -> Iterator[list[str]]:
    """Names of the unrestricted readers that get a file in `folders`, or bytes that are in one."""
    import torch

    calls: list[tuple[str, bytes]] = []

    def note(name: str, source: Any) -> None:
        if isinstance(source, str | Path):
            calls.append((name, Path(source).read_bytes()))
        elif hasattr(source, "read"):
            place = source.tell()
            calls.append((name, source.read()))
            source.seek(place)
        else:
            calls.append((name, bytes(source)))

    def noting(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, *arguments: Any, **options: Any) -> Any:
            note(name, source)
            return read(source, *arguments, **options)

        return call

    def class_noting(base: Any) -> type:
        class Unpickler(base):
            def __init__(self, file: Any, *arguments: Any, **options: Any) -> None:
                note("Unpickler", file)
                super().__init__(file, *arguments, **options)

        return Unpickler

    found: list[str] = []
    with (
        mock.patch("pickle.load", noting("pickle.load", pickle.load)),
        mock.patch("pickle.loads", noting("pickle.loads", pickle.loads)),
        mock.patch("pickle.Unpickler", class_noting(pickle.Unpickler)),
        mock.patch("pickle._Unpickler", class_noting(pickle._Unpickler)),
        mock.patch("torch.load", noting("torch.load", torch.load)),
        mock.patch("torch.serialization.load", noting("torch.load", torch.serialization.load)),
    ):
        yield found
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in files]
    for name, data in calls:
        if len(data) >= SHORTEST and any(data in content for content in contents):
            found.append(name)


def test_the_recorder_notes_every_reader(tmp_path: Path) -> None:
    import numpy as np
    import torch

    torch.save(list(range(20)), tmp_path / "a.pt")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(list(range(20))))
    np.save(tmp_path / "c.npy", np.array([{"x": list(range(20))}], object))
    content = (tmp_path / "b.pkl").read_bytes()
    readers: dict[str, Callable[[], Any]] = {
        "torch.load": lambda: torch.load(tmp_path / "a.pt", weights_only=False),
        "pickle.load": lambda: pickle.load(io.BytesIO(content)),
        "pickle.loads": lambda: pickle.loads(content),
        "Unpickler": lambda: pickle.Unpickler(io.BytesIO(content)).load(),
    }
    for name, read in readers.items():
        with recorded(tmp_path) as found:
            read()
            pickle.loads(pickle.dumps("made by the process itself"))
        assert name in found, name
        with recorded(tmp_path / "elsewhere") as found:
            read()
        assert found == []
    with recorded(tmp_path) as found:
        np.load(tmp_path / "c.npy", allow_pickle=True)
    assert found == ["pickle.load"]


def test_tokenizers_of_every_type(tmp_path: Path) -> None:
    from megatron_chatflow.tokenizer import TOKENIZER_TYPES, load_tokenizer

    shutil.copy(QUICKSTART / "tokenizer.model", tmp_path / "spm")
    backend = samples.byte_level_bpe()
    backend.model.save(str(tmp_path), "gpt2")
    vocab = json.loads((tmp_path / "gpt2-vocab.json").read_text())
    (tmp_path / "gpt2-vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
    samples.write_tiktoken(tmp_path / "tiktoken", samples.byte_ranks(backend))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "json"))
    gpt2 = {"vocab_file": "gpt2-vocab.json", "merge_file": "gpt2-merges.txt"}
    files: dict[str, dict[str, str]] = {
        **dict.fromkeys(TOKENIZER_TYPES[:3], {"tokenizer_model": "spm"}),
        "HuggingFaceTokenizer": {"tokenizer_model": "json"},
        "GPT2BPETokenizer": gpt2,
        "TikTokenizer": {"tokenizer_model": "tiktoken"},
        "ByteLevelTokenizer": {},
        "NullTokenizer": {},
    }
    assert set(files) == set(TOKENIZER_TYPES)
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil(tmp_path / "executed"), 2))
    with recorded(tmp_path) as found:
        for kind, names in files.items():
            paths: dict[str, Any] = {key: tmp_path / name for key, name in names.items()}
            load_tokenizer(kind, vocab_size=None if names else 300, **paths)
            for key in paths:
                with pytest.raises(ChatflowError, match=str(tmp_path)):
                    load_tokenizer(kind, **paths | {key: tmp_path / "evil"})
    assert found == [] and not (tmp_path / "executed").exists()


def without_state(folder: Path, evil: bytes) -> Path:
    """What Megatron-LM saves: a checkpoint in torch_dist and one in its older format."""
    write_small(folder / "iter_0000002")
    (folder / "iter_0000002" / "common.pt").write_bytes(evil)
    (folder / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(evil)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


def open_everything(sample: Path, run: Path, folder: Path) -> dict[str, tuple[int, str, str]]:
    """What each command says of what it opens; a key names a message that is expected, or none."""
    evil = pickle.dumps(Evil(folder / "executed"))
    strange = without_state(folder / "strange", evil)
    stated = folder / "stated"
    shutil.copytree(run, stated)
    (stated / "iter_0000020" / "state.json").write_bytes(evil)
    results = {
        "": train(sample, "--load", str(run), "--ckpt-step", "10"),
        " ": command("generate", "--load", str(run), "--prompt", "A", "--max-new-tokens", "2"),
        "  ": convert(run, folder / "hf"),
        "   ": convert(folder / "hf", folder / "back"),
        "names iteration 2, which is not there": train(
            sample, "--load", str(strange), "--finetune"
        ),
        "--ckpt-step one of": train(
            sample, "--load", str(strange), "--ckpt-step", "1", "--finetune"
        ),
        "state.json": train(sample, "--load", str(stated), "--ckpt-step", "20", "--finetune"),
    }
    (folder / "hf" / "model.safetensors").unlink()
    (folder / "hf" / "pytorch_model.bin").write_bytes(evil)
    results["pytorch_model.bin, which is a pickle"] = convert(folder / "hf", folder / "pickled")
    return results


def recorded_everywhere(sample: Path, run: Path, folder: Path) -> tuple[list[str], Any]:
    folder.mkdir()
    with recorded(sample, folder) as found:
        results = open_everything(sample, run, folder)
    return found, results


def test_checkpoints_and_models_of_every_kind(pool: Pool, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    ((found, results),) = pool.run(1, recorded_everywhere, reference.parent, reference, folder)
    for message, (code, _, err) in results.items():
        wanted = 2 if message.strip() else 0
        assert code == wanted and message.strip() in err, (message, code, err)
    assert found == [] and not (folder / "executed").exists()
