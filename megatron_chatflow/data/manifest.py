"""The manifest of a corpus: `<prefix>.json`, what `.bin/.idx` cannot say about themselves."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

TOKENIZER_KEYS = ("type", "name", "hash", "vocab_size", "eod")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What made a corpus, and its sizes.

    Attributes:
        tokenizer: `type`, `name`, `hash` (`Tokenizer.fingerprint()`), `vocab_size` and `eod` of the tokenizer.
        dtype: numpy's name of the token type, as in the `.idx`.
        documents: number of documents (conversations).
        tokens: number of tokens, end-of-document tokens included.
        bytes: UTF-8 bytes of the text that was tokenized (for bits per byte).
        sources: the files that were read.
        append_eod: whether each document ends with the tokenizer's end-of-document token.
        conversations: whether the `.idx` has sequence modes (prompt, answer).
    """

    tokenizer: Mapping[str, Any]
    dtype: str
    documents: int
    tokens: int
    bytes: int
    sources: Sequence[str]
    append_eod: bool
    conversations: bool


def manifest_path(prefix: str | os.PathLike) -> str:
    """Returns where the manifest of the corpus `prefix` lies."""
    return os.fspath(prefix) + ".json"


def write_manifest(prefix: str | os.PathLike, manifest: Manifest) -> None:
    """Writes `<prefix>.json` under a temporary name and renames it: it is there whole, or not at all."""
    path = manifest_path(prefix)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(manifest), file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def read_manifest(prefix: str | os.PathLike) -> Manifest | None:
    """Reads `<prefix>.json`.

    Returns:
        The manifest, or None when there is none (a corpus written by Megatron-LM).

    Raises:
        ValueError: the file is not a manifest: not JSON, a key missing, unknown, or of the wrong type.
    """
    path = manifest_path(prefix)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _refusal(path, f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _refusal(path, f"holds {type(content).__name__} in place of a mapping")
    for key in sorted(_TYPES.keys() ^ content.keys()):
        raise _refusal(path, f"{'lacks the' if key in _TYPES else 'has the unknown'} key `{key}`")
    for key, expected in _TYPES.items():
        if not isinstance(content[key], expected) or (expected is int and isinstance(content[key], bool)):
            raise _refusal(path, f"has {content[key]!r} under `{key}`, where {expected.__name__} is expected")
    for key in TOKENIZER_KEYS:
        if key not in content["tokenizer"]:
            raise _refusal(path, f"lacks `{key}` under `tokenizer`")
    return Manifest(**content)


def _refusal(path: str, problem: str) -> ValueError:
    return ValueError(f"manifest {path} {problem}: preprocess the corpus again, or delete the manifest to read the corpus without it")
