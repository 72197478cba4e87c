"""The command lines of `tools/merge_datasets.py` and `tools/verify_dataset.py`."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

from megatron_chatflow.cli.run_command import run_command
from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.data.corpus.merge import find_corpora, merge
from megatron_chatflow.data.corpus.verify import verify
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.tokenizer import TOKENIZER_TYPES, load_tokenizer
from megatron_chatflow.utils.files import disk_errors


def merge_main(argv: Sequence[str] | None = None) -> int:
    """Merges the corpora of a folder; returns the exit code: 0 written, 1 the disk failed, 2 they
    cannot be merged.
    """
    parser = argparse.ArgumentParser(
        prog="merge_datasets.py",
        description=(
            "All corpora of a folder as one, in the order of their names. Their manifests are "
            "merged too, and must name one tokenizer."
        ),
        epilog="exit codes: 0 written, 1 nothing written because a disk failed, "
        "2 nothing written because the corpora or the flags are wrong, 130 interrupted",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="DIR",
        help="folder with a .bin and an .idx of each corpus",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="files are PREFIX.bin, .idx and .json",
    )
    parser.add_argument(
        "--multimodal",
        action="store_true",
        help="refuse text; conversations are known by their .idx without it",
    )
    arguments = parser.parse_args(argv)
    return run_command("merge_datasets.py", lambda: _merge(arguments))


def _merge(arguments: argparse.Namespace) -> int:
    with disk_errors(arguments.output_prefix):
        prefixes = find_corpora(arguments.input)
        for prefix in prefixes if arguments.multimodal else ():
            if not IndexedDataset(prefix).header.multimodal:
                raise ConfigError(
                    f"--multimodal is given, but {prefix} is text without sequence modes: "
                    f"drop the flag"
                )
        merged, manifest = merge(
            prefixes,
            arguments.output_prefix,
            lambda prefix: print(f"merge_datasets.py: {prefix}", file=sys.stderr, flush=True),
        )
    files = (
        ".bin, .idx and .json"
        if manifest
        else ".bin and .idx (no manifest, as none of the parts has one)"
    )
    print(
        f"{merged.prefix}{files}: {len(prefixes)} corpora, {merged.num_documents:,} "
        f"documents, {merged.num_tokens:,} tokens"
    )
    return 0


def verify_main(argv: Sequence[str] | None = None) -> int:
    """Verifies corpora; returns the exit code: 0 all sound, 1 one is not, 2 one is not there."""
    parser = argparse.ArgumentParser(
        prog="verify_dataset.py",
        description="Reads corpora from end to end and says what is wrong with them: lengths, pointers, "
        "documents, modes, tokens outside the "
        "vocabulary, and whether manifest and checksums agree.",
        epilog=(
            "exit codes: 0 every corpus is sound, 1 one is not, 2 the command line is wrong or "
            "there is no such corpus"
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "prefix", nargs="+", metavar="PREFIX", help="a corpus, without .bin and .idx"
    )
    given = parser.add_argument_group(
        "vocabulary", "what token ids are compared with; by default what the manifest says"
    )
    given.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens of the vocabulary, before padding"
    )
    given.add_argument(
        "--tokenizer-type",
        metavar="TYPE",
        help=f"take the size from a tokenizer: {', '.join(TOKENIZER_TYPES)}",
    )
    given.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="SentencePiece model, tokenizer.json or its folder, or tiktoken JSON",
    )
    given.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT2BPETokenizer")
    given.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    arguments = parser.parse_args(argv)
    return run_command("verify_dataset.py", lambda: _verify(arguments))


def _verify(arguments: argparse.Namespace) -> int:
    prefixes, vocab_size = arguments.prefix, _vocab_size(arguments)
    for prefix in prefixes:
        if not any(os.path.exists(prefix + suffix) for suffix in (".bin", ".idx")):
            cure = (
                f"write {prefix[:-4]}" if prefix.endswith((".bin", ".idx")) else "correct the path"
            )
            raise ConfigError(f"there is no {prefix}.bin and no {prefix}.idx: {cure}")
    sound = True
    for prefix in prefixes:
        try:
            faults = verify(prefix, _progress(prefix), vocab_size)
        except ChatflowError as error:
            faults = [str(error)]
        for fault in faults:
            print(fault)
        if not faults:
            dataset = IndexedDataset(prefix)
            print(
                f"corpus {prefix}: sound, {dataset.num_documents:,} documents, "
                f"{dataset.num_tokens:,} tokens"
            )
        sound = sound and not faults
    return 0 if sound else 1


def _vocab_size(arguments: argparse.Namespace) -> int | None:
    """Returns the size of the vocabulary that the flags name, or None. Raises ValueError where they
    do not fit.
    """
    given = arguments.vocab_size
    if given is not None and given < 1:
        raise ConfigError(f"--vocab-size {given} is too few: give at least 1")
    files = {
        name: getattr(arguments, name) for name in ("tokenizer_model", "vocab_file", "merge_file")
    }
    if arguments.tokenizer_type is None:
        if any(files.values()):
            raise ConfigError("--tokenizer-type is missing: give it, or --vocab-size alone")
        return given
    return load_tokenizer(arguments.tokenizer_type, vocab_size=given, **files).vocab_size


def _progress(prefix: str) -> Callable[[int, int], None]:
    """Returns what prints how far a corpus is read, at most once a second."""
    start = last = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= 1:
            last = now
            rate = done / (now - start)
            left = (total - done) / rate
            print(
                (
                    f"{prefix}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:.0f} "
                    f"MB/s, {left:.0f} s left"
                ),
                file=sys.stderr,
                flush=True,
            )

    return show
