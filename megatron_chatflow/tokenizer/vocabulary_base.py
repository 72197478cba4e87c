"""The interface of a vocabulary that can be extended, whatever its file format."""

import abc
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_chatflow.tokenizer.merge_candidates import SymbolText, TargetCharacters

_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class NewToken:
    r"""A token to be put into a vocabulary.

    Attributes:
        id: its place: after the last, or that of a token which is removed.
        text: UTF-8 (`\u2581` for a space in SentencePiece).
        left: UTF-8 of its first part; the same as `text` where it is a character.
        right: UTF-8 of its second part; None for a character.
    """

    id: int
    text: bytes
    left: bytes
    right: bytes | None


class Vocabulary(abc.ABC):
    """The tokens of a BPE tokenizer and their merges.

    Attributes:
        type: Megatron's name for the tokenizer.
        content: the file, byte for byte.
        size: number of ids.
        text: UTF-8 of each id; empty for control tokens.
        fixed: ids that are never removed: control and added tokens, bytes, single-byte tokens
            bool[size].
    """

    type: str
    content: bytes
    size: int
    text: SymbolText
    fixed: np.ndarray

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents as symbols: int32 [n] and bool [n].

        The second array says whether the tokenizer never merges a symbol with the next one.
        """

    @abc.abstractmethod
    def lost(self, texts: Sequence[str], symbols: np.ndarray) -> set[str]:
        """Return the characters of documents that have neither a token nor bytes.

        `symbols` is what the documents were encoded to.
        """

    @abc.abstractmethod
    def split(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Return the ids of texts by merging alone: no space is added, nothing is normalized."""

    @abc.abstractmethod
    def parts(self) -> list[tuple[int, ...]]:
        """Return the two tokens that each one is merged from at last.

        Empty where nothing is merged or merging does not lead to it. A single character that has no
        token can be a part too (SentencePiece), and is left out.
        """

    @abc.abstractmethod
    def may_be_added(self, target: TargetCharacters) -> Callable[[bytes], bool]:
        """Return the function that determines whether a text can become a token.

        It is not a token yet, would make no other token reachable, and, where the new tokens are of
        other scripts than Latin, is in no Latin text.
        """

    @abc.abstractmethod
    def changed(self, removed: Iterable[int], new: Sequence[NewToken]) -> "Vocabulary":
        """Return the vocabulary without some tokens and with new ones.

        The new ones merge after all others and in the order given. An id that is removed and not
        given again has no token; ids never move.
        """

    @abc.abstractmethod
    def save(self, folder: str, source: str) -> list[str]:
        """Write the tokenizer's files and return their names.

        Files next to the `source` that belong to it are copied.
        """

    def tokens_of(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Return the ids of texts as the tokenizer encodes them inside a document."""
        return self.split(texts)

    def cut_scripts(self, scripts: Sequence[str]) -> list[str]:
        """Return those of the scripts whose words are cut at combining marks before merging."""
        return []

    def with_joined_marks(self, scripts: Sequence[str]) -> "Vocabulary":
        """Return the vocabulary with the marks of the scripts as letters.

        So words are not cut at them.
        """
        assert not scripts, scripts
        return self

    def unreachable(self, ids: Sequence[int]) -> list[int]:
        """Return those ids whose own text is not encoded to them."""
        found = self.split([self.text[i] for i in ids])
        return [i for i, split in zip(ids, found, strict=True) if split != [i]]

    def removable(self) -> list[int]:
        """Return the ids that are not fixed."""
        return np.flatnonzero(~self.fixed).tolist()


def last_merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> tuple[str, ...]:
    """Merge a text as BPE does, the pair of lowest rank first, and return the last pair.

    Args:
        symbols: the text in characters.
        rank: of a pair; None where it does not merge.

    Returns:
        The two texts that were merged last into the entire one; none where it remains in more than
        one part, or is a single character.
    """
    pair: tuple[str, ...] = ()
    while len(symbols) > 1:
        ranked = [
            (r, i)
            for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if (r := rank(a, b)) is not None
        ]
        if not ranked:
            return ()
        _, i = min(ranked)
        pair = symbols[i], symbols[i + 1]
        symbols[i : i + 2] = ["".join(pair)]
    return pair


def copy_companions(source: str, folder: str) -> list[str]:
    """Copy files next to a tokenizer's file that do not depend on its tokens; return names."""
    here = os.path.dirname(os.path.abspath(source))
    found = [name for name in _COMPANIONS if os.path.isfile(os.path.join(here, name))]
    for name in found:
        shutil.copyfile(os.path.join(here, name), os.path.join(folder, name))
    return found


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write a JSON file with line breaks, for people."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
