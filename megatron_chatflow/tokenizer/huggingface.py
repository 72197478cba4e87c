"""Hugging Face's `tokenizer.json` and GPT-2's vocabulary files, by the `tokenizers` library."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from megatron_chatflow.errors import ConfigError, TokenizerError
from megatron_chatflow.tokenizer.base import BYTE_SPACE, Tokenizer, digest, neighbors, read_bytes
from megatron_chatflow.tokenizer.unicode_scripts import SPACE
from megatron_chatflow.utils.user_files import load_json

_USUAL_ENDS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<|end\u2581of\u2581sentence|>",
    "<eos>",
    "<eod>",
)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, without padding, truncation, begin and end tokens.

    Args:
        backend: the library's tokenizer; it is changed so that special tokens inside text are text.
        type: Megatron's name.
        name: base name of its file or folder.
        eod: end-of-document id.
        bos: begin id, or None.
        pad: padding id, or None.
        fingerprint: hash of what decides the ids.
        chat_template: Jinja text of its chat template, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        type: str,
        name: str,
        eod: int,
        bos: int | None,
        pad: int | None,
        fingerprint: str,
        chat_template: str | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self._backend = backend
        self._vocab = backend.get_vocab(with_added_tokens=True)
        self._control = {
            entry.content: token
            for token, entry in backend.get_added_tokens_decoder().items()
            if entry.special
        }
        self.chat_template = chat_template
        super().__init__(
            type=type,
            name=name,
            vocab_size=max(self._vocab.values()) + 1,
            eod=eod,
            bos=bos,
            pad=pad,
            fingerprint=fingerprint,
        )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._encode([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Return `encode` of each text.

        With more than one thread it uses as many as the library takes (all cores, or
        RAYON_NUM_THREADS).
        """
        return (
            [self.encode(text) for text in texts] if num_threads == 1 else self._encode(list(texts))
        )

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        length = _length_rule(self)
        added = self._backend.get_added_tokens_decoder()
        result = np.zeros(self.vocab_size, np.int32)
        for text, token in self._vocab.items():
            result[token] = length(text)
        for token, entry in added.items():
            result[token] = 0 if entry.special else len(entry.content.encode())
        result[self.eod] = 0
        return result

    def byte_space(self) -> tuple[int, int, int] | None:
        """See `Tokenizer.byte_space`."""
        first, second, third = map(self._vocab.get, BYTE_SPACE)
        if SPACE in self._vocab or first is None or second is None or third is None:
            return None
        return first, second, third

    def control_id(self, spelling: str) -> int | None:
        """See `Tokenizer.control_id`."""
        return next(
            (
                token
                for token, entry in self._backend.get_added_tokens_decoder().items()
                if entry.content == spelling
            ),
            None,
        )

    def joins(self, before: str, after: str) -> bool:
        """Return whether an entry of a BPE vocabulary holds the two characters in any spelling.

        Models of other kinds are joined anywhere.
        """
        if not isinstance(self._backend.model, tokenizers.models.BPE):
            return True
        firsts = [text[-1:] for text in self._spellings(before)]
        seconds = [text[:1] for text in self._spellings(after)]
        return any(a + b in self._joined for a in firsts for b in seconds)

    @cached_property
    def _joined(self) -> frozenset[str]:
        return neighbors(self._vocab)

    def _spellings(self, character: str) -> list[str]:
        """Return how a vocabulary may spell a character: SentencePiece's way, or byte by byte."""
        normalizer = self._backend.normalizer
        normal = normalizer.normalize_str(character).strip(SPACE) if normalizer else character
        plain = [SPACE] if character.isspace() else []
        return [
            *plain,
            *(each for text in (character, normal) for each in (text, _spelled_bytes(text))),
        ]

    def control_tokens(self) -> Mapping[str, int]:
        """See `Tokenizer.control_tokens`."""
        return self._control

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # The library's `encode` also computes where each token is in the text, which takes a
        # third of the time.
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def load_tokenizer_json(type: str, path: str) -> HuggingFaceTokenizer:
    """Read a `tokenizer.json`, or the folder that holds one.

    Begin, end and padding tokens are those that `tokenizer_config.json` or
    `special_tokens_map.json` in the same folder names; without them the end token is the only usual
    one (`</s>`, `<|endoftext|>`, ...) among the special tokens.

    Raises:
        TokenizerError: the file is missing or is not a `tokenizer.json`, or the end-of-document
            token is ambiguous.
    """
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    content = read_bytes(type, "tokenizer_model", file)
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{type}: tokenizer_model {file} is not a tokenizer.json (Hugging Face "
            f"tokenizers): give that file or its folder"
        ) from error
    special = {
        entry.content: token
        for token, entry in backend.get_added_tokens_decoder().items()
        if entry.special
    }
    folder = os.path.dirname(os.path.abspath(file))
    declared = _declared_tokens(type, folder)
    roles = {}
    for role in ("eos_token", "bos_token", "pad_token"):
        roles[role] = None if declared.get(role) is None else backend.token_to_id(declared[role])
        if declared.get(role) is not None and roles[role] is None:
            raise TokenizerError(
                f"{type}: {role} {declared[role]!r} is not in the vocabulary of {file}: "
                f"fix tokenizer_config.json in its folder"
            )
    if roles["eos_token"] is None:
        usual = [token for token in _USUAL_ENDS if token in special]
        if len(usual) != 1:
            found = (
                f"it has {', '.join(usual)}"
                if usual
                else "none of the usual ones is among its special tokens"
            )
            raise TokenizerError(
                f"{type}: {file} does not say which token ends a document ({found}): add a "
                f"tokenizer_config.json with eos_token"
            )
        roles["eos_token"] = special[usual[0]]
    eod, bos, pad = roles["eos_token"], roles["bos_token"], roles["pad_token"]
    name = os.path.basename(os.path.normpath(path))
    fingerprint = digest("tokenizers", content, eod)
    return HuggingFaceTokenizer(
        backend,
        type=type,
        name=name,
        eod=eod,
        bos=bos,
        pad=pad,
        fingerprint=fingerprint,
        chat_template=_chat_template(type, folder, declared),
    )


def load_gpt2(type: str, vocab_file: str, merge_file: str) -> HuggingFaceTokenizer:
    """Read GPT-2's `vocab.json` and `merges.txt`; documents end with `<|endoftext|>`.

    Raises:
        TokenizerError: a file is missing or of another kind, or `<|endoftext|>` is not in the
            vocabulary.
    """
    contents = [
        read_bytes(type, setting, path)
        for setting, path in (("vocab_file", vocab_file), ("merge_file", merge_file))
    ]
    try:
        model = tokenizers.models.BPE.from_file(vocab_file, merge_file)
    except Exception as error:
        raise TokenizerError(
            f"{type}: {vocab_file} and {merge_file} are not the vocab.json and merges.txt "
            f"of a byte-level BPE ({error})"
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    eod = backend.token_to_id("<|endoftext|>")
    if eod is None:
        raise TokenizerError(
            f"{type}: vocab_file {vocab_file} lacks <|endoftext|>: add it, or use "
            f"HuggingFaceTokenizer with the model's tokenizer.json"
        )
    backend.add_special_tokens(["<|endoftext|>"])
    name = os.path.basename(vocab_file)
    return HuggingFaceTokenizer(
        backend,
        type=type,
        name=name,
        eod=eod,
        bos=None,
        pad=None,
        fingerprint=digest("tokenizers/gpt2", *contents, eod),
    )


def _declared_tokens(type: str, folder: str) -> dict[str, str]:
    """Read the names of the control tokens from the files next to a tokenizer.json.

    The first file that names one wins.
    """
    result: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            continue
        try:
            content = load_json(read_bytes(type, "the file", path))
        except ConfigError as error:
            raise TokenizerError(
                f"{type}: {path} is not JSON ({error}): fix it or remove it"
            ) from error
        if not isinstance(content, dict):
            raise TokenizerError(f"{type}: {path} holds no JSON object: copy the file again")
        for key, value in content.items():
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                result.setdefault(key, text)
    return result


def _chat_template(type: str, folder: str, declared: Mapping[str, str]) -> str | None:
    """Return the text of chat_template.jinja, or else of `chat_template` in tokenizer_config.json.

    The latter is a text, or a list of named templates, of which `default` is taken.
    """
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        try:
            return read_bytes(type, "the file", path).decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{type}: {path} is not UTF-8 ({error.reason} at byte {error.start}): fix "
                f"it or remove it"
            ) from error
    path = os.path.join(folder, "tokenizer_config.json")
    if "chat_template" in declared or not os.path.exists(path):
        return declared.get("chat_template")
    named = load_json(read_bytes(type, "the file", path)).get("chat_template")
    if named is None:
        return None
    entries = named if isinstance(named, list) else [named]
    texts = {str(e.get("name")): e.get("template") for e in entries if isinstance(e, dict)}
    if not isinstance(texts.get("default"), str):
        found = (
            f"has only {', '.join(texts)}"
            if texts
            else "is neither a text nor a list of named templates"
        )
        raise TokenizerError(f"{type}: chat_template of {path} {found}: name one of them default")
    return texts["default"]


def _byte_alphabet() -> frozenset[str]:
    return frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _spelled_bytes(text: str) -> str:
    """Return text as byte-level vocabularies spell it."""
    bytewise = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(spelling for spelling, _ in bytewise.pre_tokenize_str(text))


def _length_rule(tokenizer: HuggingFaceTokenizer) -> Any:
    """Return the function that gives the bytes of a vocabulary entry.

    It follows the tokenizer's decoder.
    """
    description = load_json(tokenizer._backend.to_str())
    kinds = {step["type"] for step in _steps(description.get("decoder"))}
    replaced = {
        step["content"]
        for step in _steps(description.get("decoder"))
        if step["type"] == "Replace" and step["pattern"] == {"String": SPACE}
    }
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        return lambda text: len(text) if alphabet.issuperset(text) else len(text.encode())
    if "Metaspace" in kinds or replaced == {" "}:
        fallback = "ByteFallback" in kinds
        return lambda text: (
            1 if fallback and _is_byte_piece(text) else len(text.replace(SPACE, " ").encode())
        )
    raise TokenizerError(
        f"{tokenizer.type}: {tokenizer.name} loses spaces, so the bytes its tokens stand "
        f"for cannot be counted: "
        "use a byte-level or a SentencePiece-like tokenizer (a decoder of type ByteLevel or "
        "Metaspace)"
    )


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return (
        [inner for each in step["decoders"] for inner in _steps(each)]
        if step["type"] == "Sequence"
        else [step]
    )


def _is_byte_piece(text: str) -> bool:
    return (
        len(text) == 6
        and text.startswith("<0x")
        and text.endswith(">")
        and all(c in "0123456789ABCDEFabcdef" for c in text[3:5])
    )
