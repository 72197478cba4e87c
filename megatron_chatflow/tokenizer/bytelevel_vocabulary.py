"""Byte-level BPE in Hugging Face's `tokenizer.json`, read and written as JSON.

GPT-2, SmolLM2, Qwen and LLaMA-3 have such files.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from megatron_chatflow.errors import TokenizerError
from megatron_chatflow.tokenizer.merge_candidates import SymbolText, TargetCharacters
from megatron_chatflow.tokenizer.pre_tokenizer import cut_scripts, join_marks, steps
from megatron_chatflow.tokenizer.unicode_scripts import (
    first_bytes,
    first_bytes_inside_words,
    only_marks,
)
from megatron_chatflow.tokenizer.vocabulary_base import (
    NewToken,
    Vocabulary,
    copy_companions,
    last_merge,
    write_json,
)
from megatron_chatflow.utils.user_files import load_json

_LONGEST = 16
"""Characters of a new token, as in SentencePiece's training."""


class ByteLevelVocabulary(Vocabulary):
    """The tokens of a byte-level BPE.

    Its merges are a list of pairs, of which the first is merged first. New ones are added at the
    end.

    Args:
        type: Megatron's name.
        path: the file, for messages.
        content: the `tokenizer.json`.
        own_pattern: whether the pre-tokenizer is no longer the one of the file at `path`.

    Raises:
        TokenizerError: it is not a byte-level BPE.
    """

    def __init__(self, type: str, path: str, content: bytes, own_pattern: bool = False) -> None:
        self.type = type
        self._own_pattern = own_pattern
        self.content = content
        self._path = path
        self._description = load_json(content)
        model = self._description["model"]
        _check(path, self._description)
        self._tokens: dict[str, int] = model["vocab"]
        self._merges = [
            tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
            for merge in model["merges"]
        ]
        added = {entry["id"]: entry for entry in self._description.get("added_tokens") or ()}
        self.size = max([*self._tokens.values(), *added]) + 1
        alphabet = byte_alphabet()
        self._byte_of = {char: byte for byte, char in enumerate(alphabet)}
        self._char_of = alphabet
        self.text = SymbolText({i: self._bytes(token) for token, i in self._tokens.items()})
        for i, entry in added.items():
            self.text[i] = b"" if entry["special"] else entry["content"].encode()
        self.fixed = np.array(
            [i in added or len(self.text.get(i, b"")) < 2 for i in range(self.size)]
        )
        self._missing = frozenset(
            byte for byte in _BYTES_OF_TEXT if alphabet[byte] not in self._tokens
        )
        self._backend = tokenizers.Tokenizer.from_buffer(content)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        merging = {key: value for key, value in model.items() if key != "ignore_merges"}
        self._merging = tokenizers.Tokenizer.from_str(
            json.dumps({"version": "1.0", "model": merging})
        ).model

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Vocabulary.encode`."""
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        ids = np.concatenate(
            [np.array(document.ids, np.int32) for document in encoded] or [np.zeros(0, np.int32)]
        )
        ends = np.zeros(len(ids), bool)
        start = 0
        for document in encoded:
            words = np.array(document.word_ids, np.int64)
            if len(words):
                ends[start : start + len(words)] = np.append(words[1:] != words[:-1], True)
            start += len(words)
        return ids, ends

    def split(self, texts: Sequence[bytes]) -> list[list[int]]:
        """See `Vocabulary.split`."""
        return [
            [token.id for token in self._merging.tokenize(self._spelled(text))] for text in texts
        ]

    def tokens_of(self, texts: Sequence[bytes]) -> list[list[int]]:
        """See `Vocabulary.tokens_of`."""
        return [self._tokens_of(text) for text in texts]

    def _tokens_of(self, text: bytes) -> list[int]:
        decoded = text.decode(errors="ignore")
        if decoded.encode() != text:
            return self.split([text])[0]
        words = self._backend.pre_tokenizer.pre_tokenize_str(decoded)
        # Spelled bytes of all words, but for a space that the pre-tokenizer puts before the first
        # one.
        spelled = [word for word, _ in words]
        spelled[0] = spelled[0][sum(map(len, spelled)) - len(text) :]
        return [token.id for word in spelled for token in self._merging.tokenize(word)]

    def cut_scripts(self, scripts: Sequence[str]) -> list[str]:
        """See `Vocabulary.cut_scripts`."""
        return cut_scripts(self._description["pre_tokenizer"], scripts)

    def with_joined_marks(self, scripts: Sequence[str]) -> "ByteLevelVocabulary":
        """See `Vocabulary.with_joined_marks`."""
        if not scripts:
            return self
        step = join_marks(self._path, self._description["pre_tokenizer"], scripts)
        return self._with(self._description | {"pre_tokenizer": step}, own_pattern=True)

    def parts(self) -> list[tuple[int, ...]]:
        """See `Vocabulary.parts`."""
        order = {merge: i for i, merge in reversed(list(enumerate(self._merges)))}

        def rank(left: str, right: str) -> float | None:
            return order.get((left, right))

        result: list[tuple[int, ...]] = [()] * self.size
        for token, i in self._tokens.items():
            if not self.fixed[i]:
                result[i] = tuple(self._tokens[part] for part in last_merge(list(token), rank))
        return result

    def may_be_added(self, target: TargetCharacters) -> Callable[[bytes], bool]:
        """See `Vocabulary.may_be_added`."""
        added = {entry["content"].encode() for entry in self._description.get("added_tokens") or ()}

        def allowed(text: bytes) -> bool:
            characters = sum(not _continues(byte) for byte in text)
            new = self._spelled(text) not in self._tokens and text not in added
            return new and characters <= _LONGEST and _is_complete_or_begins_one(text, target)

        return allowed

    def changed(self, removed: Iterable[int], new: Sequence[NewToken]) -> "ByteLevelVocabulary":
        """See `Vocabulary.changed`."""
        description = copy.deepcopy(self._description)
        model = description["model"]
        gone = set(removed)
        vocab = {token: i for token, i in self._tokens.items() if i not in gone}
        merges = [(a, b) for a, b in self._merges if a in vocab and b in vocab and a + b in vocab]
        for entry in description.get("added_tokens") or ():
            # The library numbers added tokens that the vocabulary lacks from its end on, so they
            # would move.
            vocab[entry["content"]] = entry["id"]
        for token in new:
            vocab[self._spelled(token.text)] = token.id
            assert token.right is not None, "every character is in a byte-level vocabulary"
            merges.append((self._spelled(token.left), self._spelled(token.right)))
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
        model["merges"] = (
            [" ".join(merge) for merge in merges] if as_text else [list(merge) for merge in merges]
        )
        return self._with(description, self._own_pattern)

    def _with(self, description: dict[str, Any], own_pattern: bool) -> "ByteLevelVocabulary":
        content = json.dumps(description, ensure_ascii=False, indent=2).encode()
        return ByteLevelVocabulary(self.type, self._path, content, own_pattern)

    def lost(self, texts: Sequence[str], symbols: np.ndarray) -> set[str]:
        """See `Vocabulary.lost`."""
        return (
            {char for char in set().union(*texts) if not self._missing.isdisjoint(char.encode())}
            if self._missing
            else set()
        )

    def save(self, folder: str, source: str) -> list[str]:
        """See `Vocabulary.save`."""
        with open(os.path.join(folder, "tokenizer.json"), "wb") as file:
            file.write(self.content)
        copied = copy_companions(source, folder)
        config_file = os.path.join(folder, "tokenizer_config.json")
        config: dict[str, Any] = {}
        if has_config := "tokenizer_config.json" in copied:
            with open(config_file, encoding="utf-8") as file:
                config = json.load(file)
        if not has_config or self._own_pattern:
            # Classes named after a model (GPT2Tokenizer, Qwen2Tokenizer) split by that model's
            # pattern, whatever tokenizer.json has.
            write_json(config_file, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
        return ["tokenizer.json", *(() if has_config else ("tokenizer_config.json",)), *copied]

    def _bytes(self, token: str) -> bytes:
        """Return the bytes that a token spells; an added token of the vocabulary is its text."""
        return (
            bytes(self._byte_of[char] for char in token)
            if self._byte_of.keys() >= set(token)
            else token.encode()
        )

    def _spelled(self, text: bytes) -> str:
        return "".join(self._char_of[byte] for byte in text)


def byte_alphabet() -> list[str]:
    """Return the character by which a byte-level vocabulary spells each byte.

    A byte that is a printable character of Latin-1 is spelled as that character, the others take
    the characters from U+0100 on (GPT-2's encoder.py).
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _is_complete_or_begins_one(text: bytes, target: TargetCharacters) -> bool:
    """Return whether a text is complete characters, or the first bytes of one.

    A space may come before it. Bytes from within characters are in characters of many scripts, and
    a token of them would change text that has nothing to do with the corpus. So would one of the
    first bytes of quotes, dashes, emoji or, where the target is another script, of Latin letters
    and of marks that join any letter, and one of such marks alone. All these join a letter of the
    target before them, byte by byte.
    """
    body, latin = text.removeprefix(b" "), target.other_script
    if not body or _continues(body[0]):
        return False
    complete = body.decode(errors="ignore")
    rest = body[len(complete.encode()) :]
    if not complete:
        return rest not in first_bytes(latin)
    if latin and only_marks(complete):
        return False
    return not rest or rest in first_bytes_inside_words(target.scripts, latin)


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80


_BYTES_OF_TEXT = [*range(0xC0), *range(0xC2, 0xF5)]
"""The bytes that UTF-8 is made of."""


def _check(path: str, description: dict[str, Any]) -> None:
    model = description["model"]
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        raise TokenizerError(
            f"{path} is of type {model.get('type')}, which has no merges that could be "
            f"continued: give a byte-level BPE or a SentencePiece BPE model"
        )
    if not any(step["type"] == "ByteLevel" for step in steps(description.get("pre_tokenizer"))):
        raise TokenizerError(
            f"{path} is a BPE of characters, not of bytes: give the tokenizer.model "
            f"(SentencePiece) of this model instead"
        )
    for setting in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(setting):
            raise TokenizerError(
                f"{path} has {setting} {model[setting]!r}, with which merges cannot be "
                f"continued: give a byte-level BPE as GPT-2's or LLaMA-3's"
            )
