"""No code from disk: a checkpoint is data, whatever its bytes say."""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.crafted import (
    EVIL,
    Evil,
    bombs,
    edit_metadata,
    exploit,
    read_all,
    write_small,
)
from tests.pool import Pool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small")


def refused(folder: Path) -> str:
    """The message with which a checkpoint is refused."""
    from megatron_chatflow.errors import ChatflowError

    with pytest.raises(ChatflowError) as error:
        read_all(folder)
    message = str(error.value)
    assert message.startswith((f"{folder} is not read: ", f"{folder} is damaged: "))
    assert "\n" not in message
    return message


def test_a_checkpoint_is_read_as_torch_reads_it(folder: Path) -> None:
    import torch
    from torch.distributed.checkpoint import load

    found = read_all(folder)
    state = {name: torch.empty_like(found[name]) for name in ("a", "b", "c")}
    load(state, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(state[name], found[name]) for name in state)
    assert found["object"] == [{"x": [1, 2.5, None, ("y", True)]}]
    assert found["optimizer"] == {"param_groups": [{"lr": 0.1}], "step": torch.tensor(2.0)}


def test_every_type_of_tensor_is_read_from_both_formats_of_torch() -> None:
    import torch

    from megatron_chatflow.serialization.torch_file import read_torch_file

    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool):
        matrix = torch.tensor([[0.0, 1.0, 0.5], [2.0, 3.0, 1.5]]).to(dtype)
        for tensor in (matrix, matrix.T, matrix[1:], matrix[:0], matrix[0, 0]):
            for is_zip in (True, False):
                file = io.BytesIO()
                torch.save(tensor, file, _use_new_zipfile_serialization=is_zip)
                raw = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
                found = read_torch_file(raw)
                assert found.dtype == dtype and torch.equal(found.float(), tensor.float())


def place_of(metadata: Any, name: str) -> Any:
    return next(v for index, v in metadata.storage_data.items() if index.fqn == name)


def set_place(name: str, **fields: Any) -> Callable[[Any], None]:
    return lambda metadata: vars(place_of(metadata, name)).update(fields)


def share_bytes(metadata: Any) -> None:
    vars(place_of(metadata, "b")).update(vars(place_of(metadata, "a")))


def grow(metadata: Any) -> None:
    import torch

    metadata.state_dict_metadata["a"].size = torch.Size((3, 1 << 50))


def grow_with_its_piece(metadata: Any) -> None:
    grow(metadata)
    entry = metadata.state_dict_metadata["a"]
    entry.chunks[0].sizes = entry.size


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_place("a", transform_descriptors=["stream.zstd/1"]), "is stored through"),
        (set_place("a", relative_path="/etc/passwd"), "outside of its folder"),
        (set_place("a", relative_path="../small/__0_0.distcp"), "outside of its folder"),
        (set_place("a", relative_path=".."), "outside of its folder"),
        (set_place("a", relative_path="x\0y"), "outside of its folder"),
        (set_place("a", relative_path="link"), "is a symbolic link"),
        (set_place("a", relative_path="fifo"), "is not a regular file"),
        (set_place("a", relative_path="none"), "none is missing"),
        (set_place("a", offset=1 << 40), "which has"),
        (set_place("a", length=1 << 40), "share bytes"),
        (set_place("a", length=10), "more elements than bytes"),
        (set_place("a", length=-1), "negative"),
        (set_place("a", offset=1.5), "is a float"),
        (share_bytes, "share bytes"),
        (grow, "is not complete"),
        (grow_with_its_piece, "more elements than bytes"),
        (lambda metadata: metadata.state_dict_metadata.update(a=Evil(Path("x"))), "it refers to"),
        (lambda metadata: vars(metadata).update(all_local_plans=[Evil(Path("x"))]), "it refers to"),
    ],
)
def test_what_the_metadata_says_is_compared_with_the_files(
    folder: Path, change: Callable[[Any], None], reason: str
) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "fifo")
    edit_metadata(folder, change)
    assert reason in refused(folder)


def test_an_object_that_is_harmless_until_it_is_unpacked(folder: Path, tmp_path: Path) -> None:
    exploit(folder, tmp_path / "executed")
    assert "is stored through ['stream.zstd/1']" in refused(folder)

    def without_descriptors(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.transform_descriptors = None

    edit_metadata(folder, without_descriptors)
    content = (folder / EVIL).read_bytes()
    assert content[:4] == b"U*M\x18"
    assert "instruction of no checkpoint" in refused(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "object", "linear._extra_state"])
@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_anywhere_runs(folder: Path, tmp_path: Path, name: str, protocol: int) -> None:
    import torch

    evil = pickle.dumps(Evil(tmp_path / "executed"), protocol)
    if name == ".metadata":
        (folder / name).write_bytes(evil)
    else:
        content, file = Evil(tmp_path / "executed"), io.BytesIO()
        if name == "linear._extra_state":
            content = [torch.frombuffer(bytearray(evil), dtype=torch.uint8)]
        torch.save(content, file, pickle_protocol=max(2, protocol))
        target = "common.pt" if name == "common.pt" else EVIL
        (folder / target).write_bytes(file.getvalue())

        def point_there(metadata: Any) -> None:
            for index, place in metadata.storage_data.items():
                if index.fqn.startswith(name):
                    place.relative_path, place.offset = EVIL, 0
                    place.length = len(file.getvalue())

        if target == EVIL:
            edit_metadata(folder, point_there)
    refused(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("name", "content"), list(bombs()), ids=[name for name, _ in bombs()])
def test_a_pickle_costs_no_more_than_its_bytes(folder: Path, name: str, content: bytes) -> None:
    import tracemalloc
    import zipfile

    before = (folder / ".metadata").read_bytes()
    for target in (".metadata", "common.pt"):
        if target == ".metadata":
            (folder / target).write_bytes(content)
        else:
            (folder / ".metadata").write_bytes(before)
            with zipfile.ZipFile(folder / target, "w") as archive:
                archive.writestr("common/data.pkl", content)
        tracemalloc.start()
        refused(folder)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 2 * len(content) + (4 << 20), name


def test_a_compressed_member_is_refused(folder: Path) -> None:
    import zipfile

    with zipfile.ZipFile(folder / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("common/data.pkl", b"\x80\x02}." + b"\0" * (1 << 22))
    assert "compressed" in refused(folder)


def test_a_tensor_larger_than_its_storage_is_refused(folder: Path) -> None:
    import torch

    torch.save({"x": torch.zeros(1).expand(1 << 40)}, folder / "common.pt")
    assert "larger than its storage" in refused(folder)


def guarded_readers() -> None:
    import torch

    from megatron_chatflow.checkpoint.loading import unrestricted_readers_refused

    file = io.BytesIO()
    torch.save([1], file)
    readers: list[Callable[[], Any]] = [
        lambda: pickle.loads(pickle.dumps(1)),
        lambda: pickle.load(io.BytesIO(pickle.dumps(1))),
        lambda: pickle.Unpickler(io.BytesIO(pickle.dumps(1))).load(),
        lambda: torch.load(io.BytesIO(file.getvalue()), weights_only=False),
        lambda: torch.serialization.load(io.BytesIO(file.getvalue()), weights_only=False),
    ]
    before = pickle.load, pickle.loads, pickle.Unpickler, torch.load, torch.serialization.load
    with pytest.raises(ZeroDivisionError), unrestricted_readers_refused():
        with unrestricted_readers_refused():
            pass
        for read in readers:
            with pytest.raises(pickle.UnpicklingError, match="while a checkpoint was loaded"):
                read()
        results: list[Any] = []
        other = threading.Thread(target=lambda: results.extend(read() for read in readers))
        other.start()
        other.join()
        assert results == [1, 1, 1, [1], [1]]
        raise ZeroDivisionError
    after = pickle.load, pickle.loads, pickle.Unpickler, torch.load, torch.serialization.load
    assert after == before and [read() for read in readers] == [1, 1, 1, [1], [1]]


def test_readers_without_restriction_fail_while_a_checkpoint_is_loaded(pool: Pool) -> None:
    pool.run(1, guarded_readers)


def test_layers_unpickle_bytes_that_were_written_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """States with recipes, as Transformer Engine 2 writes them, keep their content."""
    import dataclasses
    import enum
    import types
    from typing import NamedTuple

    import torch

    from megatron_chatflow.fp8 import extra_state

    module = types.ModuleType("transformer_engine.common.recipe")
    namespace = {"__module__": module.__name__}

    class _FormatHelper(NamedTuple):
        max_fwd: float
        max_bwd: float

    helper = _FormatHelper
    helper.__module__, helper.__qualname__ = module.__name__, "_FormatHelper"
    forms = enum.Enum("Format", {"E4M3": helper(448, 448)}, module=module.__name__)
    recipe = dataclasses.make_dataclass(
        "DelayedScaling", [("margin", int, 0), ("fp8_format", Any, None)], namespace=namespace
    )
    for kind in (helper, forms, recipe):
        setattr(module, kind.__name__, kind)
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    saved = {
        "recipe": recipe(3, forms.E4M3),
        "scale_fwd": torch.rand(3),
        "extra_fp8_variables": {"num_gemms": 1, "update": (True, None, [0.5])},
    }
    original = bytearray(pickle.dumps(saved))
    found = extra_state.rewrite(torch.frombuffer(original, dtype=torch.uint8))
    assert found is not None and bytes(found.tolist()) != bytes(original)
    again = pickle.loads(found.numpy().tobytes())
    assert torch.equal(again.pop("scale_fwd"), saved.pop("scale_fwd")) and again == saved
    trailing = torch.frombuffer(original + b"cos\nsystem\n.", dtype=torch.uint8)
    assert b"system" not in extra_state.rewrite(trailing).numpy().tobytes()
