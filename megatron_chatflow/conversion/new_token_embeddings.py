"""Rows of the embedding and of the output layer for tokens that the model has never seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.tokenizer.token_map import TOKEN_MAP, MappedToken, TokenMap
from megatron_chatflow.utils.seeding import seed_from

METHODS = ("mean", "random", "mean_all")


def check_base(
    token_map: TokenMap, folder: Path, tokenizer_files: Sequence[Path], rows: int
) -> None:
    """Refuse a map that was made from none of the model's tokenizer files.

    `rows` are those of the model's embedding.
    """
    actual = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tokenizer_files}
    if token_map.base_sha256 not in actual.values():
        raise ConfigError(
            f"{folder / TOKEN_MAP}: made from a tokenizer with the sha256 "
            f"{token_map.base_sha256[:12]}..., and the model's is "
            f"{', '.join(f'{name} {sha[:12]}...' for name, sha in actual.items())}; extend "
            f"the tokenizer of this very model"
        )
    if token_map.base_vocab_size > rows:
        raise ConfigError(
            f"{folder / TOKEN_MAP}: its base has {token_map.base_vocab_size} tokens and the "
            f"model {rows} rows; extend its own"
        )


def with_new_rows(
    matrix: torch.Tensor,
    base_vocab_size: int,
    rows: int,
    new: Sequence[MappedToken],
    method: str,
    side: str,
    std: float,
    seed: int,
) -> torch.Tensor:
    """Return the matrix [rows, hidden] with the rows of `new` made by `method`.

    All other rows are unchanged, bit for bit.

    ``mean`` is the mean of the rows of a token's pieces: for the ``input`` side the plain one,
    ``E[pieces].mean(0)``, for the ``output`` side weighted with the characters of each piece (arXiv
    2608.03494). ``mean_all`` is the mean of all rows of the base vocabulary, ``random`` is normal
    with `std`, a function of (seed, side). Means are taken in float32.

    Args:
        matrix: [base rows, hidden], in which the pieces are looked up.
        base_vocab_size: Rows of `matrix` that are tokens; those beyond are padding of the model.
        rows: Rows of the result.
        new: The tokens to make rows for.
        method: One of `METHODS`.
        side: ``input`` or ``output``. A tied matrix is both, and takes the input's rule: every
            layer reads the embedding, and the weighted mean was shown for a separate output layer.
        std: Standard deviation of the initial weights.
        seed: Of ``random``.
    """
    result = matrix.new_zeros(rows, matrix.shape[1])
    result[: len(matrix)] = matrix
    ids = torch.tensor([token.id for token in new])
    if method == "mean_all":
        result[ids] = matrix[:base_vocab_size].float().mean(0).to(matrix.dtype)
    elif method == "random":
        name = f"{seed}/new rows/{side}"
        generator = torch.Generator().manual_seed(seed_from(name))
        result[ids] = (
            torch.empty(len(new), matrix.shape[1])
            .normal_(0.0, std, generator=generator)
            .to(matrix.dtype)
        )
    else:
        for token in new:
            result[token.id] = _mean(
                matrix[list(token.pieces)].float(), token.chars if side == "output" else None
            ).to(matrix.dtype)
    return result


def _mean(rows: torch.Tensor, weights: Sequence[float] | None) -> torch.Tensor:
    if weights is None or not sum(weights):
        return rows.mean(0)
    share = torch.tensor(weights) / sum(weights)
    return (rows * share[:, None]).sum(0)


def report(token_map: TokenMap, methods: dict[str, Any]) -> str:
    """One line: how many rows were made, and how."""
    verb = "added" if token_map.kind == "extend" else "replaced"
    return f"{len(token_map.new):,} rows {verb}: " + ", ".join(
        f"{side} {method}" for side, method in methods.items()
    )
