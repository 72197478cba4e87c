"""tools/merge_datasets.py as a program, with megatron-core's builder as the oracle."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets import indexed_dataset as megatron

from megatron_chatflow.data import (
    IndexedDataset,
    IndexedDatasetBuilder,
    Manifest,
    read_manifest,
    verify,
    write_manifest,
)

TOOL = Path(__file__).resolve().parents[2] / "tools" / "merge_datasets.py"
TOKENIZER = {
    "type": "SentencePieceTokenizer",
    "name": "a.model",
    "hash": "ab",
    "vocab_size": 8000,
    "eod": 2,
}


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def write(
    prefix,
    *,
    documents=((3,), (1, 2)),
    dtype=np.uint16,
    modes=False,
    manifest=True,
    tokenizer=TOKENIZER,
    append_eod=True,
):
    """A corpus of random tokens: `documents` are the lengths of each one's sequences."""
    rng = np.random.default_rng(len(str(prefix)))
    with IndexedDatasetBuilder(prefix, dtype, modes) as builder:
        for lengths in documents:
            builder.add_document(
                rng.integers(0, 8000, sum(lengths)),
                lengths,
                [i % 2 for i in range(len(lengths))] if modes else None,
            )
        described = Manifest(
            tokenizer=tokenizer,
            dtype=np.dtype(dtype).name,
            documents=builder.num_documents,
            tokens=builder.num_tokens,
            bytes=5,
            sources=[os.path.basename(prefix)],
            append_eod=append_eod,
            conversations=modes,
        )
        builder.finalize(described if manifest else None)


def oracle(folder, names, modes):
    builder = megatron.IndexedDatasetBuilder(f"{folder}/oracle.bin", np.uint16, modes)
    for name in names:
        builder.add_index(f"{folder}/{name}")
    builder.finalize(f"{folder}/oracle.idx")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "parts").mkdir()
    return tmp_path / "parts"


@pytest.mark.parametrize("modes", [False, True])
def test_the_merged_files_are_byte_for_byte_megatron_s_in_the_order_of_the_names(folder, modes):
    for name, documents in (("b", [(4,), ()]), ("a10", [(1, 5)]), ("a2", [(2,), (3, 1, 1)])):
        write(folder / name, documents=documents, modes=modes)
    result = run("--input", folder, "--output-prefix", folder.parent / "out" / "all")
    assert result.returncode == 0, result.stderr
    oracle(folder, ["a10", "a2", "b"], modes)
    for suffix in (".bin", ".idx"):
        assert (folder.parent / "out" / ("all" + suffix)).read_bytes() == (
            folder / ("oracle" + suffix)
        ).read_bytes()
    assert verify(folder.parent / "out" / "all") == []
    assert sorted(os.listdir(folder.parent / "out")) == ["all.bin", "all.idx", "all.json"]


def test_the_manifest_adds_up_what_the_parts_say(folder):
    write(folder / "a")
    write(folder / "b", documents=[(7,)], tokenizer=TOKENIZER | {"name": "same/a.model"})
    assert run("--input", folder, "--output-prefix", folder.parent / "all").returncode == 0
    merged, parts = (
        read_manifest(folder.parent / "all"),
        [read_manifest(folder / name) for name in "ab"],
    )
    assert (
        merged.tokenizer == TOKENIZER
        and merged.append_eod
        and not merged.conversations
        and merged.dtype == "uint16"
    )
    assert (merged.documents, merged.tokens, merged.bytes, merged.sources) == (
        3,
        13,
        10,
        ["a", "b"],
    )
    assert merged.crc32 not in [part.crc32 for part in parts]


def test_corpora_of_megatron_without_manifests_are_merged_without_one(folder):
    for name in "ab":
        write(folder / name, manifest=False)
    result = run("--input", folder, "--output-prefix", folder.parent / "all")
    assert result.returncode == 0 and "no manifest" in result.stdout
    assert (
        IndexedDataset(folder.parent / "all").num_tokens == 12
        and read_manifest(folder.parent / "all") is None
    )


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (
            {},
            {"tokenizer": TOKENIZER | {"name": "b.model", "hash": "cd"}},
            "so they cannot be merged: preprocess them with one tokenizer",
        ),
        ({"manifest": False}, {"manifest": False, "dtype": np.int32}, "tokens of uint16"),
        ({}, {"modes": True}, "merge text and conversations apart"),
        (
            {"manifest": False},
            {"modes": True, "manifest": False},
            "merge text and conversations apart",
        ),
        ({}, {"append_eod": False}, "no end-of-document tokens"),
        ({}, {"manifest": False}, "has none"),
    ],
)
def test_corpora_that_do_not_go_together_are_refused_by_name(folder, first, second, named):
    write(folder / "a", **first)
    write(folder / "b", **second)
    result = run("--input", folder, "--output-prefix", folder.parent / "out" / "all")
    assert (
        result.returncode == 2
        and named in result.stderr
        and str(folder / "a") in result.stderr
        and str(folder / "b") in result.stderr
    )
    assert len(result.stderr.splitlines()) == 1
    assert not (folder.parent / "out").exists()


def damage_lengths(folder):
    with open(folder / "a.idx", "r+b") as file:
        file.seek(34)
        file.write(np.array([2, 2], "<i4").tobytes())


def damage_manifest(folder):
    manifest = read_manifest(folder / "a")
    (folder / "a.json").unlink()
    write(folder / "a", documents=[(9,)], manifest=False)
    write_manifest(folder / "a", dataclasses.replace(manifest, crc32=None))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "a.bin is missing"),
        (lambda folder: os.truncate(folder / "a.idx", 40), "truncated"),
        (lambda folder: os.truncate(folder / "a.bin", 4), "truncated"),
        (damage_lengths, "sequence 1 does not start where the one before it ends"),
        (damage_manifest, "the manifest belongs to another corpus"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no .bin and .idx"),
        (lambda folder: folder.rename(folder.parent / "elsewhere"), "is not a folder"),
    ],
)
def test_damaged_corpora_are_refused_and_nothing_is_left(folder, damage, named):
    for name in "ab":
        write(folder / name)
    damage(folder)
    result = run("--input", folder, "--output-prefix", folder.parent / "all")
    assert (
        result.returncode == 2 and named in result.stderr and len(result.stderr.splitlines()) <= 2
    )
    assert not [path for path in folder.parent.iterdir() if path.name.startswith("all")]


def test_an_output_among_the_corpora_is_refused(folder):
    write(folder / "a")
    before = (folder / "a.bin").read_bytes()
    result = run("--input", folder, "--output-prefix", folder / "a")
    assert result.returncode == 2 and "is one of the corpora to merge" in result.stderr
    assert (folder / "a.bin").read_bytes() == before


def test_megatron_s_flag_for_conversations_is_held_to(folder):
    write(folder / "a", modes=True)
    assert (
        run("--input", folder, "--output-prefix", folder.parent / "all", "--multimodal").returncode
        == 0
    )
    write(folder / "b")
    result = run("--input", folder, "--output-prefix", folder.parent / "all", "--multimodal")
    assert result.returncode == 2 and "drop the flag" in result.stderr


def test_the_memory_of_a_merge_does_not_grow_with_the_corpora(folder):
    def peak(sequences):
        for name in "ab":
            with IndexedDatasetBuilder(folder / name, np.uint16) as builder:
                builder.add_documents(
                    np.ones(sequences, np.uint16),
                    np.ones(sequences, np.int32),
                    np.ones(sequences, np.int32),
                )
                builder.finalize()
        code = f"""
            import sys
            sys.path.insert(0, {str(TOOL.parents[1])!r})
            from megatron_chatflow.cli.corpus import merge_main
            output = {str(folder.parent / "all")!r}
            merge_main(["--input", {str(folder)!r}, "--output-prefix", output])
            status = dict(line.split(":", 1) for line in open("/proc/self/status"))
            print(status["VmHWM"].split()[0])
        """
        code = "\n".join(line.strip() for line in code.splitlines())
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        )
        return int(result.stdout.split()[-1]) / 1024

    small, large = peak(2_000_000), peak(8_000_000)
    assert large < small + 30
