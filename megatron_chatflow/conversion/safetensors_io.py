"""A folder as transformers writes it: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.utils.user_files import load_json, open_inside, read_text

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights by their name in safetensors."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "token_map.json",
)  # fmt: skip
MODEL_FILES = ("config.json", "generation_config.json", "LICENSE", "NOTICE", "USE_POLICY.md")

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_FILE = 1024**3


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError where there is none."""
    try:
        text = read_text(path)
    except ChatflowError as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a complete folder") from None
    try:
        content = load_json(text)
    except ChatflowError as error:
        raise ConfigError(f"{path} is not JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; copy the file again")
    return content


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class Weights:
    """The tensors of a folder, found by name and read one at a time.

    Raises:
        ConfigError: there are no safetensors, a file that the index names is missing or damaged, or
        the types are not those of weights.
    """

    def __init__(self, folder: Path) -> None:
        """Find the tensors of all files; none is read."""
        self._files = _locate(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in sorted(set(self._files.values())):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - no mapping
                        if self._files.get(name) == path:
                            self._describe(path, name, file.get_slice(name))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} is damaged ({error}); copy it again") from None
        missing = sorted(self._files.keys() - self.shapes.keys())
        if missing:
            raise ConfigError(
                f"{self._files[missing[0]]} lacks {missing[0]}, which {_INDEX} places "
                f"there; copy the folder again"
            )

    def _describe(self, path: Path, name: str, piece: Any) -> None:
        if piece.get_dtype() not in DTYPES:
            raise ConfigError(
                f"{path}: {name} is of type {piece.get_dtype()}; only {', '.join(DTYPES)} "
                f"can be converted"
            )
        self.shapes[name], self.dtypes[name] = tuple(piece.get_shape()), DTYPES[piece.get_dtype()]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        The file is mapped only while the tensor lives, so memory does not add up.
        """
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def _is_in(folder: Path, name: str) -> bool:
    """Return whether a file that the index names exists.

    Raises ConfigError for a name that leads elsewhere.
    """
    path = folder / name
    try:
        if "/" not in name and path.is_symlink() and _is_cached(path):
            return path.is_file()
        open_inside(folder, name).close()
    except FileNotFoundError:
        return False
    except (OSError, ChatflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{folder / _INDEX}: {reason}; give a folder with all files in it"
        ) from None
    return True


def _is_cached(path: Path) -> bool:
    """Whether a link is one of the Hugging Face cache: snapshots/REVISION/NAME to blobs/HASH."""
    snapshots = Path(os.path.realpath(path.parent)).parent
    blobs = Path(os.path.realpath(path)).parent
    return snapshots.name == "snapshots" and blobs == snapshots.parent / "blobs"


def _locate(folder: Path) -> dict[str, Path]:
    """{tensor: file}."""
    if (folder / _INDEX).is_file():
        files = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ConfigError(f"{folder / _INDEX} has no weight_map; copy the file again")
        missing = [
            name for name in sorted(set(map(str, files.values()))) if not _is_in(folder, name)
        ]
        if missing:
            raise ConfigError(
                f"{folder} is not complete: {_INDEX} names {', '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not there"
            )
        return {tensor: folder / name for tensor, name in files.items()}
    path = folder / _SINGLE
    if not path.is_file():
        other = sorted(p.name for p in folder.glob("*.bin"))
        advice = (
            (
                f"; it has {other[0]}, which is a pickle: save the model again with "
                f"transformers' save_pretrained"
            )
            if other
            else ""
        )
        raise ConfigError(
            f"{folder} has neither {_SINGLE} nor "
            f"{_INDEX}{advice or '; give a Hugging Face folder with safetensors'}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}); copy it again") from None


class WeightsWriter:
    """Writes tensors that come in order into files of at most 1 GiB, and the index of several.

    Args:
        folder: where.
        sizes: {tensor: bytes} of all that will come, in that order; from it the number of files
        follows.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        """Assign every tensor to a file."""
        self._folder = folder
        self._shares: list[list[str]] = [[]]
        room = _LARGEST_FILE
        for name, size in sizes.items():
            if self._shares[-1] and size > room:
                self._shares.append([])
                room = _LARGEST_FILE
            self._shares[-1].append(name)
            room -= size
        self._total, self._written = sum(sizes.values()), 0
        self._pending: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor."""
        share = self._shares[self._written]
        assert name == share[len(self._pending)], f"{name} comes out of order"
        self._pending[name] = tensor.contiguous()
        if len(self._pending) == len(share):
            save_file(
                self._pending, self._folder / self._name(self._written), metadata={"format": "pt"}
            )
            self._pending = {}
            self._written += 1

    def finish(self) -> int:
        """Write the index where there is more than one file; returns how many there are."""
        assert self._written == len(self._shares), "tensors are missing"
        if self._written > 1:
            places = {name: self._name(i) for i, share in enumerate(self._shares) for name in share}
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return self._written

    def _name(self, i: int) -> str:
        return (
            _SINGLE
            if len(self._shares) == 1
            else f"model-{i + 1:05d}-of-{len(self._shares):05d}.safetensors"
        )
