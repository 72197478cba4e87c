"""A Hugging Face folder to a run directory that holds one checkpoint, of iteration 0, and no optimizer.

SAVE/iter_0000000/      the weights in torch_dist, for any layout, and state.json
SAVE/huggingface/       the tokenizer's files, config.json, generation_config.json: what the way back needs
SAVE/config.yaml        the model's settings and its tokenizer
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_chatflow.config import Config, UsageError, padded_vocab_size, to_yaml
from megatron_chatflow.conversion.hf_config import config_json, model_settings
from megatron_chatflow.conversion.hf_folder import MODEL_FILES, TOKENIZER_FILES, Weights, copy_files, read_json
from megatron_chatflow.conversion.mapping import WORD_TABLES, huggingface_names, join, split_shapes
from megatron_chatflow.conversion.new_rows import TokenMap, check_base, read_token_map, report, with_new_rows
from megatron_chatflow.conversion.torch_dist import Contents, Piece, describe, write
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.training.run_directory import POINTER, iteration_folder, write_atomically

FILES = "huggingface"
"""Folder of a run directory with the files that are carried along."""

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
    told: TokenMap | None = None
    methods: dict[str, str] = field(default_factory=dict)
    """{side: method} of the new rows."""


def convert(load: Path, save: Path, tokenizer_folder: Path | None, methods: dict[str, str | None], say: Callable[[str], None]) -> None:
    """Convert the folder `load` into the run directory `save`, which must not exist or be empty.

    Args:
        load: config.json and safetensors of the LLaMA family.
        save: is there, whole, when this returns; a killed conversion leaves ``SAVE.partial`` behind.
        tokenizer_folder: an extended tokenizer with its token_map.json; None keeps the model's own.
        methods: for the sides ``input`` and ``output`` of new rows; None is ``mean``.
        say: prints a line.

    Raises:
        UsageError: what is there cannot be converted; nothing has been written.
    """
    hf = read_json(load / "config.json")
    settings, notes = model_settings(hf, str(load / "config.json"))
    weights = Weights(load)
    tied = not settings.untie_embeddings_and_output_weights
    vocabulary = _vocabulary(load, tokenizer_folder, hf, methods, tied, notes)
    config = Config(model=settings)
    config.tokenizer.tokenizer_type, config.tokenizer.vocab_size = vocabulary.tokenizer_type, vocabulary.rows
    config.tokenizer.tokenizer_model = f"{FILES}/{vocabulary.tokenizer_file.name}"
    contents = describe(config, vocabulary.rows)
    dtypes = _check_weights(contents, weights, config, vocabulary.base_rows, load, notes)
    config.training.bf16 = dtypes["embedding.word_embeddings.weight"] in (torch.bfloat16, torch.float16)
    _check_target(save)
    for note in notes:
        say(note)
    if vocabulary.told is not None:
        say(report(vocabulary.told, vocabulary.methods))

    partial = save.with_name(save.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder = iteration_folder(partial, 0)
    folder.mkdir(parents=True)
    write(folder, contents, dtypes, _maker(weights, config, vocabulary, say))
    (partial / FILES).mkdir()
    copy_files(load, partial / FILES, MODEL_FILES)
    copy_files(vocabulary.tokenizer_file.parent, partial / FILES, TOKENIZER_FILES)
    dtype = str(dtypes["embedding.word_embeddings.weight"]).removeprefix("torch.")
    (partial / FILES / "config.json").write_text(json.dumps(config_json(settings, vocabulary.rows, dtype, hf), indent=2) + "\n", encoding="utf-8")
    state = {"iteration": 0, "consumed_train_samples": 0, "optimizer": False, "converted_from": {"type": "huggingface", "name": load.name}}
    write_atomically(folder / "state.json", json.dumps(state, indent=1))
    write_atomically(partial / "config.yaml", _yaml(config))
    write_atomically(partial / POINTER, "0\n")
    os.rename(partial, save)


def _vocabulary(
    load: Path, folder: Path | None, hf: dict[str, Any], methods: dict[str, str | None], tied: bool, notes: list[str]
) -> Vocabulary:
    kind, file, own = _open_tokenizer(load)
    rows = hf.get("vocab_size")
    if not isinstance(rows, int):
        raise UsageError(f"{load / 'config.json'}: vocab_size is missing; take the config.json that belongs to the weights")
    if own.vocab_size > rows:
        raise UsageError(
            f"{load}: the tokenizer has {own.vocab_size} tokens and the model has {rows} rows (vocab_size in config.json); they do not belong together: "
            "take the model's own tokenizer, or give the extended one with its token_map.json as --tokenizer-folder"
        )
    if folder is None:
        asked = [side for side, method in methods.items() if method]
        if asked:
            raise UsageError(f"there are no new rows to make for the {asked[0]} side; give --tokenizer-folder with an extended tokenizer, or drop the flag")
        if own.vocab_size < rows:
            notes.append(f"the model has {rows - own.vocab_size} rows more than its tokenizer has tokens ({own.vocab_size}); they are kept")
        return Vocabulary(kind, file, rows, rows)
    if tied and methods["output"] and methods["output"] != (methods["input"] or "mean"):
        raise UsageError("the model's embedding is its output layer as well (tie_word_embeddings), so --new-output-rows has no meaning of its own; drop it")
    told = read_token_map(folder)
    check_base(told, folder, file, rows)
    new_kind, new_file, new = _open_tokenizer(folder)
    if new.vocab_size != told.vocab_size:
        raise UsageError(f"{folder}: the tokenizer has {new.vocab_size} tokens and its token_map.json says {told.vocab_size}; make the tokenizer again")
    sides = ("input",) if tied else ("input", "output")
    return Vocabulary(new_kind, new_file, rows, max(rows, told.vocab_size), told, {side: methods[side] or "mean" for side in sides})


def _open_tokenizer(folder: Path) -> tuple[str, Path, Tokenizer]:
    """(Megatron's type, file, tokenizer) of a folder; tokenizer.json goes before tokenizer.model, as in transformers."""
    for name, kind in (("tokenizer.json", "HuggingFaceTokenizer"), ("tokenizer.model", "SentencePieceTokenizer")):
        if (folder / name).is_file():
            return kind, folder / name, load_tokenizer(kind, tokenizer_model=folder / name)
    raise UsageError(f"{folder} has neither tokenizer.json nor tokenizer.model; a model is converted together with its tokenizer: copy it there")


def _check_weights(
    contents: Contents, weights: Weights, config: Config, base_rows: int, load: Path, notes: list[str]
) -> dict[str, torch.dtype]:
    """{key: type}, after every tensor was found to be there, of the shape that the settings mean, and none beside."""
    groups = config.model.num_query_groups or config.model.num_attention_heads
    queries = config.model.num_attention_heads // groups
    left, dtypes = dict(weights.shapes), {}
    for piece in contents.pieces():
        shape = (base_rows, *piece.shape[1:]) if piece.key in WORD_TABLES else piece.shape
        names = huggingface_names(piece.key, piece.layer)
        for name, wanted in zip(names, split_shapes(piece.key, shape, groups, queries), strict=True):
            if name not in left:
                raise UsageError(f"{load}: the weights lack {name}, which config.json asks for; copy the folder again")
            if left.pop(name) != wanted:
                raise UsageError(f"{load}: {name} is {list(weights.shapes[name])} and should be {list(wanted)} by config.json; they do not belong together")
        found = {weights.dtypes[name] for name in names} | {dtypes.get(piece.key, weights.dtypes[names[0]])}
        if len(found) > 1:
            raise UsageError(f"{load}: {names[0]} and its like are of several types ({', '.join(sorted(map(str, found)))}); save the model in one")
        dtypes[piece.key] = found.pop()
    if _TIED_COPY in left:
        _check_copy(weights, load, notes)
        del left[_TIED_COPY]
    unknown = [name for name in left if not name.endswith(_BUFFER)]
    if unknown:
        raise UsageError(f"{load}: {unknown[0]} has no place in the model that config.json describes ({len(unknown)} such tensors); it cannot be converted")
    return dtypes


def _check_copy(weights: Weights, load: Path, notes: list[str]) -> None:
    """A tied model whose file holds the output layer as well, as some do."""
    if not torch.equal(weights.read(_TIED_COPY), weights.read("model.embed_tokens.weight")):
        raise UsageError(f"{load}: {_TIED_COPY} differs from the embedding, and config.json says tie_word_embeddings; set it to false if that is so")
    notes.append(f"{_TIED_COPY} is the embedding once more (tie_word_embeddings); it is kept once")


def _check_target(save: Path) -> None:
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UsageError(f"--save-dir {save} is there already; give a new folder")


def _maker(weights: Weights, config: Config, vocabulary: Vocabulary, say: Callable[[str], None]) -> Callable[[Piece], torch.Tensor]:
    groups = config.model.num_query_groups or config.model.num_attention_heads
    padded = padded_vocab_size(config, vocabulary.rows)
    step = max(1, config.model.num_layers // 10)

    def make(piece: Piece) -> torch.Tensor:
        if piece.layer is not None and piece.layer % step == 0 and piece.key.endswith("linear_qkv.weight"):
            say(f" layer {piece.layer} of {config.model.num_layers}")
        parts = [weights.read(name) for name in huggingface_names(piece.key, piece.layer)]
        if piece.key not in WORD_TABLES:
            return join(piece.key, parts, groups)
        (table,), side, told = parts, WORD_TABLES[piece.key], vocabulary.told
        new, base = (told.new, told.base_vocab_size) if told else ((), vocabulary.base_rows)
        method = vocabulary.methods.get(side, "mean")
        return with_new_rows(table, base, padded, new, method, side, config.model.init_method_std, config.training.seed)

    return make


def _yaml(config: Config) -> str:
    """The sections that a conversion knows; all other settings are the command's that reads it."""
    sections = yaml.safe_load(to_yaml(config))
    kept = {"model": sections["model"], "training": {"bf16": config.training.bf16}, "tokenizer": sections["tokenizer"]}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
