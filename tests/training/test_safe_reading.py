"""No code from disk: a checkpoint is data, whatever its bytes say."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool
from tests.training.crafted import EVIL, Evil, edit_metadata, exploit, write_small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small")


def read_all(folder: Path) -> dict[str, Any]:
    """{name: value} of everything in a checkpoint."""
    from megatron_chatflow.training.reading import CheckpointReader

    reader = CheckpointReader(folder)
    found: dict[str, Any] = {name: reader.tensor(name) for name in reader.tensors}
    others = [i for i in reader.metadata.storage_data if i.fqn not in found]
    return found | {i.fqn: value for i, value in reader.pieces(others)} | reader.common()


def refused(folder: Path) -> str:
    """The message with which a checkpoint is refused."""
    from megatron_chatflow.config import UsageError

    with pytest.raises(UsageError) as error:
        read_all(folder)
    message = str(error.value)
    assert message.startswith(f"{folder} is not read: ") and "\n" not in message
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

    from megatron_chatflow.engine.torch_file import read_torch_file

    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool):
        whole = torch.tensor([[0.0, 1.0, 0.5], [2.0, 3.0, 1.5]]).to(dtype)
        for tensor in (whole, whole.T, whole[1:], whole[:0], whole[0, 0]):
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
        (set_place("a", relative_path="none"), "No such file"),
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


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pickles that Python's own reader answers with memory, recursion or time."""
    yield "bytes", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."
    yield "text", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"."
    yield "bytearray", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."
    yield "memo", b"\x80\x02Nr" + struct.pack("<I", (1 << 32) - 1) + b"."
    yield "frame", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"."
    yield "integer", b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"."
    yield "tuples", b"\x80\x02)" + b"\x85" * 20_000 + b"."
    yield "key", b"\x80\x02})" + b"\x85" * 3_000 + b"Ns."
    yield "lists", b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    yield "marks", b"\x80\x02" + b"(" * 20_000 + b"t" * 19_999 + b"."
    yield "sizes", b"\x80\x02(" + b"K\x01" * 9_000 + b"tq\x000ctorch\nSize\nh\x00\x85R."
    yield "laughs", b"\x80\x02]q\x00" + b"".join(b"]h%ch%caq%c" % (i, i, i + 1) for i in range(90)) + b"."


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

    from megatron_chatflow.training.loading import unrestricted_readers_refused

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

    from megatron_chatflow.precision import state

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
    found = state.rewrite(torch.frombuffer(original, dtype=torch.uint8))
    assert found is not None and bytes(found.tolist()) != bytes(original)
    again = pickle.loads(found.numpy().tobytes())
    assert torch.equal(again.pop("scale_fwd"), saved.pop("scale_fwd")) and again == saved
    trailing = torch.frombuffer(original + b"cos\nsystem\n.", dtype=torch.uint8)
    assert b"system" not in state.rewrite(trailing).numpy().tobytes()


VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: r.choice([-1, 0, 1, 1 << 31, 1 << 62, 1 << 2000, 1.5, None, True, "", b"", ()]),
    lambda r: r.choice(["../a", "/etc/passwd", "/dev/zero", ".", "__0_0.distcp", "\0", "x" * 9999]),
    lambda r: tuple([r.choice([0, 1, 1 << 40])] * r.choice([1, 2, 70, 20_000])),
    lambda r: ["stream.zstd/1"],
    lambda r: nested(r.choice([10, 400])),
    lambda r: Evil(Path("executed")),
]


def nested(depth: int) -> Any:
    value: Any = ()
    for i in range(depth):
        value = (value,) if i % 2 else [value]
    return value


def change_objects(content: bytes, r: random.Random) -> bytes:
    """Put strange values into the unpickled ``.metadata``."""
    import torch

    metadata = pickle.loads(content)
    for _ in range(r.randint(1, 3)):
        targets = [metadata, *metadata.storage_data.values()]
        for entry in metadata.state_dict_metadata.values():
            targets += [entry, *getattr(entry, "chunks", [])]
        target, value = r.choice(targets), r.choice(VALUES)(r)
        if isinstance(value, tuple) and all(type(n) is int and n < 1 << 60 for n in value):
            value = torch.Size(value) if r.random() < 0.7 else value
        if fields := list(getattr(target, "__dict__", ())):
            target.__dict__[r.choice(fields)] = value
        if r.random() < 0.2 and isinstance(metadata.storage_data, dict):
            metadata.storage_data[r.choice(["x", 1, None, *metadata.storage_data])] = value
        if not isinstance(metadata.state_dict_metadata, dict):
            break
        if not isinstance(metadata.storage_data, dict):
            break
    return pickle.dumps(metadata, r.randint(2, 5))


def change_bytes(content: bytes, r: random.Random) -> bytes:
    """Replace, remove, repeat and insert bytes; instructions that announce a lot are among them."""
    changed = bytearray(content)
    pieces = [piece for _, piece in bombs()]
    for _ in range(r.choice([1, 1, 2, 5, 30])):
        place, count = r.randrange(len(changed) + 1), r.choice([1, 1, 2, 8, 100])
        match r.randrange(6):
            case 0:
                changed[place : place + 1] = bytes([r.randrange(256)])
            case 1:
                del changed[place : place + count]
            case 2:
                changed[place:place] = changed[place : place + count]
            case 3:
                changed[place:place] = r.choice(pieces)[2:-1]
            case 4:
                changed[place:place] = bytes([r.choice(b"(])}tlaesuR\x85\x86\x81b0.Nh")]) * count
            case 5:
                changed[place:place] = pickle.dumps(Evil(Path("executed")), r.randint(2, 5))[2:-1]
    return bytes(changed)


def fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read checkpoints with damaged files; runs in a process of its own, see below."""
    import resource
    import tracemalloc

    import torch

    from megatron_chatflow.config import UsageError

    torch.set_num_threads(1)
    names = [".metadata", "__0_0.distcp", "common.pt"]
    intact = {name: (folder / name).read_bytes() for name in names}
    read_all(folder)
    seen: list[str] = []
    watched = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn")
    sys.addaudithook(lambda event, _: seen.append(event) if event in watched else None)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), -1))
    tracemalloc.start()
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(count):
        r = random.Random(seed + number)
        name = r.choice([".metadata", ".metadata", ".metadata", *names])
        change = change_objects if name == ".metadata" and r.random() < 0.5 else change_bytes
        content = change(intact[name], r)
        (folder / name).write_bytes(content)
        seen.clear()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            read_all(folder)
            outcomes["loaded"] += 1
        except UsageError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and "memory" not in str(error), (number, str(error))
        most = tracemalloc.get_traced_memory()[1] - before
        assert most < 2 * len(content) + (4 << 20), (number, name, len(content), most)
        assert not seen and not Path("executed").exists(), (number, name, seen)
        (folder / name).write_bytes(intact[name])
    return outcomes


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_read_and_never_run(folder: Path, count: int) -> None:
    """Twice a file's size and 4 MiB at most, in an address space of 64 MiB beyond the process's own."""
    call = f"from tests.training.test_safe_reading import *; print(fuzz(Path({str(folder)!r}), {count}, 0))"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = eval(done.stdout)
    assert outcomes["refused"] > count / 2 and outcomes["loaded"] > count / 50, outcomes
