"""The manifest of a corpus, `<prefix>.json`: what `.bin/.idx` do not contain."""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import ChatflowError, DataError
from megatron_chatflow.utils.files import write_atomically
from megatron_chatflow.utils.user_files import load_json, read_text, visible

_TOKENIZER_TYPES = {"type": str, "name": str, "hash": str, "vocab_size": int, "eod": int | None}
_TYPES = {
    "tokenizer": dict,
    "dtype": str,
    "documents": int,
    "tokens": int,
    "bytes": int,
    "sources": list,
    "append_eod": bool,
    "conversations": bool,
}
_OPTIONAL = {"crc32": dict}
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What made a corpus, and its sizes.

    Attributes:
        tokenizer: `type`, `name`, `hash` (`Tokenizer.fingerprint()`), `vocab_size` and `eod` of the
            tokenizer.
        dtype: numpy's name of the token type, as in the `.idx`.
        documents: number of documents (conversations).
        tokens: number of tokens, end-of-document tokens included.
        bytes: UTF-8 bytes of the text that was tokenized (for bits per byte).
        sources: the files that were read.
        append_eod: whether each document ends with the tokenizer's end-of-document token.
        conversations: whether the `.idx` has sequence modes (prompt, answer).
        crc32: checksums of the `bin` and the `idx` (`file_crc32`); None if they were not taken.
    """

    tokenizer: Mapping[str, Any]
    dtype: str
    documents: int
    tokens: int
    bytes: int
    sources: Sequence[str | dict[str, Any]]
    append_eod: bool
    conversations: bool
    crc32: Mapping[str, str] | None = None


def file_crc32(path: str) -> str:
    """Return the CRC-32 of a file, 8 hexadecimal digits.

    It finds every change of up to 32 consecutive bits, and misses one other in 2**32.
    """
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def manifest_path(prefix: str | os.PathLike) -> str:
    """Return the path of the manifest of the corpus `prefix`."""
    return os.fspath(prefix) + ".json"


def write_manifest(prefix: str | os.PathLike, manifest: Manifest) -> None:
    """Write `<prefix>.json` atomically."""
    content = {
        key: value for key, value in dataclasses.asdict(manifest).items() if value is not None
    }
    text = json.dumps(content, ensure_ascii=False, indent=2)
    write_atomically(Path(manifest_path(prefix)), text + "\n")


def read_manifest(prefix: str | os.PathLike) -> Manifest | None:
    """Read `<prefix>.json`.

    Returns:
        The manifest, or None when there is none (a corpus written by Megatron-LM).

    Raises:
        DataError: the file is not a manifest: not JSON, a key missing, unknown, or of the wrong
            type.
    """
    path = manifest_path(prefix)
    if not os.path.exists(path):
        return None
    try:
        content = load_json(read_text(path))
    except ChatflowError as error:
        raise _refusal(path, f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _refusal(path, f"holds {type(content).__name__} in place of a mapping")
    for key in sorted(_TYPES.keys() ^ (content.keys() - _OPTIONAL)):
        raise _refusal(path, f"{'lacks the' if key in _TYPES else 'has the unknown'} key `{key}`")
    for key, expected in (_TYPES | _OPTIONAL).items():
        if (key in _TYPES or content.get(key) is not None) and not _fits(content[key], expected):
            raise _refusal(
                path, f"has {content[key]!r} under `{key}`, where {expected.__name__} is expected"
            )
    for key, expected in _TOKENIZER_TYPES.items():
        if key not in content["tokenizer"]:
            raise _refusal(path, f"lacks `{key}` under `tokenizer`")
        if not _fits(content["tokenizer"][key], expected):
            raise _refusal(path, f"has {content['tokenizer'][key]!r} under `tokenizer`, `{key}`")
    if set(content.get("crc32") or ("bin", "idx")) != {"bin", "idx"}:
        raise _refusal(
            path, f"has {content['crc32']!r} under `crc32`, where `bin` and `idx` are expected"
        )
    return Manifest(**content)


def _fits(value: Any, expected: Any) -> bool:
    """Return whether a value of a manifest has its type.

    A boolean is not a number, and no number is negative.
    """
    return (
        isinstance(value, expected)
        and isinstance(value, bool) == (expected is bool)
        and not (isinstance(value, int) and value < 0)
    )


def _refusal(path: str, problem: str) -> DataError:
    return DataError(
        visible(
            f"manifest {path} {problem}: preprocess the corpus again, or delete the "
            f"manifest to read the corpus without it"
        )
    )
