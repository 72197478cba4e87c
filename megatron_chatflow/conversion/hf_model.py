"""A Hugging Face model opened for reading, checked with its tokenizer.

It gives megatron-core's tensors one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.config import Config
from megatron_chatflow.config.schema import ModelSettings
from megatron_chatflow.conversion.hf_config import model_settings
from megatron_chatflow.conversion.new_token_embeddings import (
    check_base,
    report,
    with_new_rows,
)
from megatron_chatflow.conversion.safetensors_io import Weights, read_json
from megatron_chatflow.conversion.torch_dist import Contents, Piece, describe
from megatron_chatflow.conversion.weight_mapping import (
    WORD_TABLES,
    huggingface_names,
    join,
    split_shapes,
)
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.token_map import TokenMap, read_token_map

TOKENIZERS = {"tokenizer.json": "HuggingFaceTokenizer", "tokenizer.model": "SentencePieceTokenizer"}
"""Files that say how text becomes ids, and Megatron's name of what reads them; the first that is
there is taken, as in transformers.
"""

_TIED_COPY = "lm_head.weight"
_BUFFER = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Vocabulary:
    """The rows that the model will have."""

    tokenizer_type: str
    tokenizer_file: Path
    base_rows: int
    """Rows of the Hugging Face model."""
    rows: int
    token_map: TokenMap | None
    methods: dict[str, str]
    """{side: method} of the new rows."""


@dataclass(frozen=True)
class Opened:
    """A model of the LLaMA family; `open_folder` makes it."""

    folder: Path
    hf: dict[str, Any]
    """Its config.json."""
    config: Config
    """Model, tokenizer and precision; all other settings as they are by default."""
    vocabulary: Vocabulary
    contents: Contents
    dtypes: dict[str, torch.dtype]
    """Of each of megatron-core's keys."""
    notes: tuple[str, ...]
    """Sentences that the user should see."""
    weights: Weights

    def tensor(self, piece: Piece) -> torch.Tensor:
        """Return a tensor in megatron-core's layout, in the type that it has in the folder.

        A word table has the rows of `piece`, padding among them.
        """
        parts = [self.weights.read(name) for name in huggingface_names(piece.key, piece.layer)]
        if piece.key not in WORD_TABLES:
            return join(piece.key, parts, groups_of(self.config.model)[0])
        v, side = self.vocabulary, WORD_TABLES[piece.key]
        new, base = (
            (v.token_map.new, v.token_map.base_vocab_size) if v.token_map else ((), v.base_rows)
        )
        std, seed = self.config.model.init_method_std, self.config.training.seed
        return with_new_rows(
            parts[0], base, piece.shape[0], new, v.methods.get(side, "mean"), side, std, seed
        )


def groups_of(model: ModelSettings) -> tuple[int, int]:
    """(groups of query heads, query heads in one)."""
    groups = model.num_query_groups or model.num_attention_heads
    return groups, model.num_attention_heads // groups


def open_folder(
    folder: Path, tokenizer_folder: Path | None = None, methods: dict[str, str | None] | None = None
) -> Opened:
    """Open and check a Hugging Face folder; of its weights only names and shapes are read.

    Args:
        folder: config.json, safetensors and tokenizer of the LLaMA family.
        tokenizer_folder: an extended tokenizer with its token_map.json; None keeps the model's own.
        methods: for the sides ``input`` and ``output`` of new rows, see `new_rows`; None is
        ``mean``.

    Raises:
        ConfigError: it cannot be converted, or model and tokenizer do not fit.
    """
    hf = read_json(folder / "config.json")
    settings, notes = model_settings(hf, str(folder / "config.json"))
    weights = Weights(folder)
    tied = not settings.untie_embeddings_and_output_weights
    vocabulary = _vocabulary(
        folder, tokenizer_folder, hf, methods or {"input": None, "output": None}, tied, notes
    )
    config = Config(model=settings).replace(
        tokenizer_type=vocabulary.tokenizer_type,
        vocab_size=vocabulary.rows,
        tokenizer_model=str(vocabulary.tokenizer_file),
    )
    contents = describe(config, vocabulary.rows)
    dtypes = _check_weights(contents, weights, settings, vocabulary.base_rows, folder, notes)
    half = dtypes["embedding.word_embeddings.weight"] in (torch.bfloat16, torch.float16)
    config = config.replace(bf16=half)
    if vocabulary.token_map is not None:
        notes.append(report(vocabulary.token_map, vocabulary.methods))
    return Opened(folder, hf, config, vocabulary, contents, dtypes, tuple(notes), weights)


def _vocabulary(
    load: Path,
    folder: Path | None,
    hf: dict[str, Any],
    methods: dict[str, str | None],
    tied: bool,
    notes: list[str],
) -> Vocabulary:
    kind, file, own = _open_tokenizer(load)
    rows = hf.get("vocab_size")
    if not isinstance(rows, int):
        raise ConfigError(
            f"{load / 'config.json'}: vocab_size is missing; take the config.json that "
            f"belongs to the weights"
        )
    if own.vocab_size > rows:
        raise ConfigError(
            f"{load}: the tokenizer has {own.vocab_size} tokens and the model has {rows} "
            f"rows (vocab_size in config.json); they do not belong "
            "together: take the model's own tokenizer, and give an extended one with its "
            "token_map.json as --tokenizer-folder"
        )
    if folder is None:
        if any(methods.values()):
            raise ConfigError(
                "there are no new rows to make; give --tokenizer-folder with an extended "
                "tokenizer, or drop --new-rows"
            )
        if own.vocab_size < rows:
            notes.append(
                f"the model has {rows - own.vocab_size} rows more than its tokenizer has "
                f"tokens ({own.vocab_size}); they are kept"
            )
        return Vocabulary(kind, file, rows, rows, None, {})
    if tied and methods["output"] and methods["output"] != (methods["input"] or "mean"):
        raise ConfigError(
            "the model's embedding is its output layer as well (tie_word_embeddings), so "
            "--new-output-rows has no effect; drop it"
        )
    token_map = read_token_map(folder)
    check_base(
        token_map, folder, [load / name for name in TOKENIZERS if (load / name).is_file()], rows
    )
    new_kind, new_file, new = _open_tokenizer(folder)
    if new.vocab_size != token_map.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {new.vocab_size} tokens and its token_map.json "
            f"says {token_map.vocab_size}; make it again"
        )
    sides = ("input",) if tied else ("input", "output")
    return Vocabulary(
        new_kind,
        new_file,
        rows,
        max(rows, token_map.vocab_size),
        token_map,
        {side: methods[side] or "mean" for side in sides},
    )


def _open_tokenizer(folder: Path) -> tuple[str, Path, Tokenizer]:
    """(Megatron's type, file, tokenizer) of a folder."""
    for name, kind in TOKENIZERS.items():
        if (folder / name).is_file():
            return kind, folder / name, load_tokenizer(kind, tokenizer_model=folder / name)
    raise ConfigError(
        f"{folder} has neither tokenizer.json nor tokenizer.model; a model is converted "
        f"together with its tokenizer: copy it there"
    )


def _check_weights(
    contents: Contents,
    weights: Weights,
    settings: ModelSettings,
    base_rows: int,
    load: Path,
    notes: list[str],
) -> dict[str, torch.dtype]:
    """Return {key: type} once every tensor is present in the expected shape, and no other."""
    left, dtypes = dict(weights.shapes), {}
    for piece in contents.pieces():
        shape = (base_rows, *piece.shape[1:]) if piece.key in WORD_TABLES else piece.shape
        names = huggingface_names(piece.key, piece.layer)
        for name, wanted in zip(
            names, split_shapes(piece.key, shape, *groups_of(settings)), strict=True
        ):
            if name not in left:
                raise ConfigError(
                    f"{load}: the weights lack {name}, which config.json asks for; copy the "
                    f"folder again"
                )
            if left.pop(name) != wanted:
                found = list(weights.shapes[name])
                raise ConfigError(
                    f"{load}: {name} is {found} and should be {list(wanted)} by "
                    f"config.json; take the one that belongs to the weights"
                )
        found = {weights.dtypes[name] for name in names} | {
            dtypes.get(piece.key, weights.dtypes[names[0]])
        }
        if len(found) > 1:
            raise ConfigError(
                f"{load}: {names[0]} and its like are of several types "
                f"({', '.join(sorted(map(str, found)))}); save the model in one"
            )
        dtypes[piece.key] = found.pop()
    if left.pop(_TIED_COPY, None):
        if not torch.equal(weights.read(_TIED_COPY), weights.read("model.embed_tokens.weight")):
            raise ConfigError(
                f"{load}: {_TIED_COPY} differs from the embedding, and config.json says "
                f"tie_word_embeddings; set that to false"
            )
        notes.append(
            f"{_TIED_COPY} is the embedding once more (tie_word_embeddings); it is kept once"
        )
    unknown = [name for name in left if not name.endswith(_BUFFER)]
    if unknown:
        raise ConfigError(
            f"{load}: tensors without a place in the model of config.json, {unknown[0]} "
            f"first of {len(unknown)}; it cannot be converted"
        )
    return dtypes
