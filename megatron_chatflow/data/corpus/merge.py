"""Merge several corpora into one: the pipeline behind `tools/merge_datasets.py`."""

import os
from collections.abc import Callable, Sequence

from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.data.corpus.manifest import Manifest, manifest_path, read_manifest
from megatron_chatflow.data.corpus.verify import manifest_error
from megatron_chatflow.data.corpus.writer import IndexedDatasetBuilder
from megatron_chatflow.errors import DataError
from megatron_chatflow.utils.user_files import check_line

_SUFFIXES = (".bin", ".idx")
_ALIKE = ("type", "hash", "vocab_size", "eod")


def find_corpora(folder: str | os.PathLike) -> list[str]:
    """Return the prefix of each corpus in a folder, sorted, as Megatron's `merge_datasets.py` does.

    Raises:
        DataError: the folder does not exist, holds no corpus, or one of the two files of a corpus
            is missing.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise DataError(
            f"--input {folder} is not a folder: give the folder that holds the corpora to merge"
        )
    files = {
        name
        for name in os.listdir(folder)
        if name.endswith(_SUFFIXES) and os.path.isfile(os.path.join(folder, name))
    }
    names = sorted({name[:-4] for name in files})
    if not names:
        raise DataError(
            f"--input {folder} holds no .bin and .idx: give the folder that holds the "
            f"corpora to merge"
        )
    for name in names:
        for suffix in _SUFFIXES:
            if name + suffix not in files:
                raise DataError(
                    f"--input {folder}: {name + suffix} is missing: complete the corpus "
                    f"{name}, or take it out of the folder"
                )
    return [os.path.join(folder, name) for name in names]


def merge(
    prefixes: Sequence[str],
    output_prefix: str,
    progress: Callable[[str], None] = lambda prefix: None,
) -> tuple[IndexedDataset, Manifest | None]:
    """Write the documents of several corpora, in the given order, as one corpus.

    Everything is checked before anything is written; files are copied in chunks, and memory does
    not depend on their sizes.

    Args:
        prefixes: the corpora.
        output_prefix: the corpus to write.
        progress: called with each prefix before it is copied.

    Returns:
        The new corpus, and its manifest: tokens, bytes and sources of all; None when none of the
        corpora has one.

    Raises:
        DataError: the corpora do not fit together (token type, sequence modes, tokenizer,
            end-of-document tokens, only some with a manifest), one is damaged, or the output is one
            of them.
        OSError: the output cannot be written.
    """
    if not os.path.basename(output_prefix):
        raise DataError(
            f"--output-prefix {output_prefix!r} is not a prefix of a file name: give one such "
            f"as out/all"
        )
    check_line("--output-prefix", output_prefix)
    for prefix in prefixes:
        if os.path.realpath(prefix) == os.path.realpath(output_prefix):
            raise DataError(
                f"--output-prefix {output_prefix} is one of the corpora to merge: give "
                f"another name, or take it out of the folder"
            )
    corpora = [IndexedDataset(prefix) for prefix in prefixes]
    manifest = _merged([_manifest(corpus) for corpus in corpora], corpora)
    filled = next((corpus for corpus in corpora if corpus.num_sequences), corpora[0])
    for corpus in corpora:
        if corpus.dtype != filled.dtype:
            raise _unlike(
                filled.prefix,
                f"tokens of {filled.dtype.name}",
                corpus.prefix,
                corpus.dtype.name,
                "preprocess them with one tokenizer",
            )
        if corpus.num_sequences and corpus.header.multimodal != filled.header.multimodal:
            kinds = ("text", "conversations")
            kind, other = kinds[filled.header.multimodal], kinds[corpus.header.multimodal]
            raise _unlike(
                filled.prefix, kind, corpus.prefix, other, "merge text and conversations apart"
            )
    os.makedirs(os.path.dirname(output_prefix) or ".", exist_ok=True)
    with IndexedDatasetBuilder(output_prefix, filled.dtype, filled.header.multimodal) as builder:
        for corpus in corpora:
            progress(corpus.prefix)
            builder.add_index(corpus.prefix)
        builder.finalize(manifest)
    return IndexedDataset(output_prefix), manifest


def _manifest(corpus: IndexedDataset) -> Manifest | None:
    manifest = read_manifest(corpus.prefix)
    problem = manifest and manifest_error(corpus.header, manifest, corpus.prefix)
    if problem:
        raise DataError(f"corpus {corpus.prefix}: {problem}")
    return manifest


def _merged(
    manifests: Sequence[Manifest | None], corpora: Sequence[IndexedDataset]
) -> Manifest | None:
    """Return the manifest of all corpora together."""
    having = [
        (manifest, corpus.prefix)
        for manifest, corpus in zip(manifests, corpora, strict=True)
        if manifest is not None
    ]
    if not having:
        return None
    for manifest, corpus in zip(manifests, corpora, strict=True):
        if manifest is None:
            raise DataError(
                f"corpus {having[0][1]} has a manifest and corpus {corpus.prefix} has none, "
                f"so it is unknown whether their tokenizers are the same: "
                f"delete {manifest_path(having[0][1])} and its like to merge without manifests"
            )
    first, prefix = having[0]
    for other, other_prefix in having[1:]:
        for key in _ALIKE:
            if other.tokenizer[key] != first.tokenizer[key]:
                names = [
                    f"the tokenizer {manifest.tokenizer['name']} ({key} {manifest.tokenizer[key]})"
                    for manifest in (first, other)
                ]
                raise _unlike(
                    prefix, names[0], other_prefix, names[1], "preprocess them with one tokenizer"
                )
        if other.append_eod != first.append_eod:
            names = [
                f"{'' if manifest.append_eod else 'no '}end-of-document tokens"
                for manifest in (first, other)
            ]
            raise _unlike(prefix, names[0], other_prefix, names[1], "preprocess them alike")
    every = [manifest for manifest, _ in having]
    return Manifest(
        tokenizer=first.tokenizer,
        dtype=first.dtype,
        documents=sum(manifest.documents for manifest in every),
        tokens=sum(manifest.tokens for manifest in every),
        bytes=sum(manifest.bytes for manifest in every),
        sources=[source for manifest in every for source in manifest.sources],
        append_eod=first.append_eod,
        conversations=any(manifest.conversations for manifest in every),
    )


def _unlike(prefix: str, has: str, other: str, has_other: str, fix: str) -> DataError:
    return DataError(
        f"corpus {prefix} has {has}, corpus {other} has {has_other}, so they cannot be "
        f"merged: {fix}"
    )
