"""Files that a manifest or an index names are regular files in the same folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def leading_out(folder: Path) -> dict[Any, str]:
    """{name: message} of names that a file of the folder may not hold."""
    other = folder.parent / "other"
    other.write_bytes(b"{}")
    (folder / "inside").write_bytes(b"{}")
    (folder / "link").symlink_to(other)
    (folder / "short").symlink_to("inside")
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    return {
        str(other): "outside of its folder",
        str(folder / "inside"): "outside of its folder",
        "../other": "outside of its folder",
        "folder/../inside": "outside of its folder",
        "..": "outside of its folder",
        "": "outside of its folder",
        "/dev/zero": "outside of its folder",
        "x\0y": "outside of its folder",
        "x\ny": "outside of its folder",
        "x\ud800": "outside of its folder",
        "link": "link is a symbolic link",
        "short": "short is a symbolic link",
        "fifo": "fifo is not a regular file",
        "folder": "folder is not a regular file",
        "x" * 300: "File name too long",
    }


def test_manifests_of_checkpoints(tmp_path: Path) -> None:
    from megatron_chatflow.checkpoint import integrity
    from megatron_chatflow.utils.files import record_file

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    for name in ("common.pt", ".metadata", "metadata.json"):
        (folder / name).write_bytes(b"data")
    integrity.write_manifest(folder, integrity.record_files(folder))
    assert integrity.damage(folder, lambda name, size: True) is None
    records = dict(integrity.read_manifest(folder) or {})
    entry = record_file(folder / "state.json")
    for name, message in leading_out(folder).items():
        (folder / integrity.NAME).write_text(integrity._render(records | {name: entry}))
        for read in (True, False):
            found = integrity.damage(folder, lambda name, size: read)  # noqa: B023
            assert found and message in found and found.isprintable(), found
    for entry in (5, [], {}, {"bytes": "2"}, {"bytes": None, "sha256": ""}):
        (folder / integrity.NAME).write_text(integrity._render(records | {"state.json": entry}))
        found = integrity.damage(folder, lambda name, size: True)
        assert found == "manifest.json is damaged ('state.json' has no size)"
    for place in (os.mkfifo, lambda path: path.symlink_to(folder / "state.json")):
        (folder / integrity.NAME).unlink()
        place(folder / integrity.NAME)
        found = integrity.damage(folder, lambda name, size: True)
        assert found and found.startswith("manifest.json is damaged (manifest.json is "), found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with two files of weights and their index."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "models--x" / "snapshots" / "1"
    folder.mkdir(parents=True)
    for name in "ab":
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    return folder


def write_index(folder: Path, names: Any) -> None:
    content = {"weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_indices_of_safetensors(model: Path) -> None:
    from megatron_chatflow.conversion.safetensors_io import Weights
    from megatron_chatflow.errors import ChatflowError

    index = {"a": "a.safetensors", "b": "b.safetensors"}
    write_index(model, index)
    assert set(Weights(model).shapes) == {"a", "b"}
    for name, message in leading_out(model).items():
        write_index(model, index | {"b": name})
        with pytest.raises(ChatflowError) as error:
            Weights(model)
        assert message in str(error.value) and "\n" not in str(error.value)
    for strange in (5, None, [], {"x": 1}):
        write_index(model, index | {"b": strange})
        with pytest.raises(ChatflowError, match="not complete"):
            Weights(model)
    write_index(model, index | {"b": "none", "c": "other"})
    with pytest.raises(ChatflowError, match="names none, other, which are not there"):
        Weights(model)


@pytest.mark.parametrize(
    ("place", "accepted"),
    [
        (lambda root: root / "blobs" / "1f", True),
        (lambda root: root / "other" / "1f", False),
        (lambda root: root.parent / "blobs" / "1f", False),
    ],
)
def test_links_of_the_hugging_face_cache(
    model: Path, place: Callable[[Path], Path], accepted: bool
) -> None:
    from megatron_chatflow.conversion.safetensors_io import Weights
    from megatron_chatflow.errors import ChatflowError

    target = place(model.parents[1])
    target.parent.mkdir()
    (model / "b.safetensors").rename(target)
    (model / "b.safetensors").symlink_to(os.path.relpath(target, model))
    write_index(model, {"a": "a.safetensors", "b": "b.safetensors"})
    if accepted:
        assert Weights(model).read("b").tolist() == [1, 1]
    else:
        with pytest.raises(ChatflowError, match="b.safetensors is a symbolic link"):
            Weights(model)
