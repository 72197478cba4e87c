"""What an extension needs to know of a vocabulary, whatever its file format."""

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
    """A token to be put into a vocabulary.

    Attributes:
        id: its place: behind the last, or that of a token which is taken out.
        text: UTF-8 (`\\u2581` for a space in SentencePiece).
        left: UTF-8 of its first part; of itself where it is a character.
        right: UTF-8 of its second part; None of a character.
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
        fixed: ids that are never taken out: control and added tokens, bytes, single-byte tokens
        bool[size].
    """

    type: str
    content: bytes
    size: int
    text: SymbolText
    fixed: np.ndarray

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents as symbols int32[n], and whether the tokenizer never merges a
        symbol with the next one bool[n].
        """

    @abc.abstractmethod
    def lost(self, texts: Sequence[str], symbols: np.ndarray) -> set[str]:
        """Returns the characters of documents, which were encoded to these symbols, that have
        neither a token nor bytes to spell them with.
        """

    @abc.abstractmethod
    def split(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Returns the ids of texts by merging alone: no space is put before them, nothing is
        normalised.
        """

    @abc.abstractmethod
    def parts(self) -> list[tuple[int, ...]]:
        """Returns the two tokens that each one is merged from at last; none where nothing is merged
        or merging does not lead to it.

        A single character that has no token can be a part too (SentencePiece), and is left out.
        """

    @abc.abstractmethod
    def may_be_added(self, target: TargetCharacters) -> Callable[[bytes], bool]:
        """Returns the function that determines whether a text can become a token.

        It is no token yet, would make no other token reachable, and, where the new tokens are of
        other scripts than Latin, is in no Latin text.
        """

    @abc.abstractmethod
    def changed(self, removed: Iterable[int], new: Sequence[NewToken]) -> "Vocabulary":
        """Returns the vocabulary without some tokens and with new ones, which merge after all
        others and in the order given.

        An id that is taken out and not given again stands for nothing; ids never move.
        """

    @abc.abstractmethod
    def save(self, folder: str, source: str) -> list[str]:
        """Writes the tokenizer's files; those beside the `source` that go with it are taken along.
        Returns the names of the files.
        """

    def tokens_of(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Returns the ids of texts as the tokenizer encodes them inside a document."""
        return self.split(texts)

    def cut_scripts(self, scripts: Sequence[str]) -> list[str]:
        """Returns those of the scripts whose words the tokenizer cuts at combining marks before it
        merges.
        """
        return []

    def with_joined_marks(self, scripts: Sequence[str]) -> "Vocabulary":
        """Returns the vocabulary with the marks of the scripts as letters, so that words are not
        cut at them.
        """
        assert not scripts, scripts
        return self

    def unreachable(self, ids: Sequence[int]) -> list[int]:
        """Returns those ids whose own text is not encoded to them."""
        found = self.split([self.text[i] for i in ids])
        return [i for i, split in zip(ids, found, strict=True) if split != [i]]

    def removable(self) -> list[int]:
        """Returns the ids that are not fixed."""
        return np.flatnonzero(~self.fixed).tolist()


def last_merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> tuple[str, ...]:
    """Merges a text as BPE does: the pair of lowest rank first, the first of equals.

    Args:
        symbols: the text in characters.
        rank: of a pair; None where it does not merge.

    Returns:
        The two texts that became the whole at last; none where it stays in more than one, or is a
        single character.
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
    """Copies what stands here a tokenizer's file and does not depend on its tokens into another
    folder; returns the names.
    """
    here = os.path.dirname(os.path.abspath(source))
    found = [name for name in _COMPANIONS if os.path.isfile(os.path.join(here, name))]
    for name in found:
        shutil.copyfile(os.path.join(here, name), os.path.join(folder, name))
    return found


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON file as people read it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
