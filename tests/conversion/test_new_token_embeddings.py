"""Rows for tokens that an extended tokenizer has and the model has not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_chatflow.conversion.new_token_embeddings import (
    with_new_rows,
)
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.token_map import MappedToken, read_token_map
from tests.conversion.models import TEXTS, greedy, run_logits, tensors, tool, write_tokenizer
from tests.pool import Pool

Folders = Callable[[str], Path]
ADDED = ("人权", "尊严", "兄弟关系")


def shares(tokenizer: Any, pieces: list[int]) -> list[float]:
    """Characters of each piece: a byte counts its share of the character it belongs to."""
    text = tokenizer.decode(pieces)
    owner = [1 / len(char.encode()) for char in text for _ in char.encode()]
    lengths = tokenizer.token_bytes()[pieces]
    ends = np.cumsum(lengths)
    assert ends[-1] == len(owner)
    return [sum(owner[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def extended(folder: Path, base: Path, family: str, kind: str = "extend", **changes: Any) -> Path:
    """A tokenizer with ADDED at the end, or the token map alone of one that replaces the ids 300 to
    302, and its token_map.json.
    """
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=base)
    write_tokenizer(folder, family, ADDED if kind == "extend" else ())
    first = tokenizer.vocab_size if kind == "extend" else 300
    size = tokenizer.vocab_size + (len(ADDED) if kind == "extend" else 0)
    new = [
        {
            "id": first + i,
            "pieces": tokenizer.encode(text),
            "chars": shares(tokenizer, tokenizer.encode(text)),
        }
        for i, text in enumerate(ADDED)
    ]
    sha = hashlib.sha256((base / "tokenizer.json").read_bytes()).hexdigest()
    content = {
        "version": 1,
        "kind": kind,
        "base_vocab_size": tokenizer.vocab_size,
        "vocab_size": size,
        "base_sha256": sha,
        "new": new,
    }
    (folder / "token_map.json").write_text(json.dumps(content | changes))
    return folder


def test_the_mean_is_over_rows_and_weighted_by_characters_on_the_output_side() -> None:
    """The error in some public scripts is a mean over everything, which is one number."""
    matrix = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    new = [
        MappedToken(10, (1, 2, 2), (1.0, 0.25, 0.75)),
        MappedToken(11, (9,), (2.0,)),
        MappedToken(3, (3, 4), (0.0, 0.0)),
    ]
    exact = matrix.double().numpy()
    for side, weights in (("input", [1 / 3, 1 / 3, 1 / 3]), ("output", [0.5, 0.125, 0.375])):
        result = with_new_rows(matrix, 10, 14, new, "mean", side, 0.02, 1)
        wanted = sum(w * exact[piece] for w, piece in zip(weights, (1, 2, 2), strict=True))
        assert result.dtype == torch.bfloat16 and result.shape == (14, 6)
        np.testing.assert_allclose(result[10].double().numpy(), wanted, rtol=2**-8)
        assert result[11].equal(matrix[9]) and not result[12:].any()
        np.testing.assert_allclose(
            result[3].double().numpy(), (exact[3] + exact[4]) / 2, rtol=2**-8
        )
        kept = [i for i in range(10) if i != 3]
        assert result[kept].equal(matrix[kept])


def test_the_mean_of_all_leaves_the_padding_of_the_model_out() -> None:
    matrix = torch.cat([torch.full((4, 2), 3.0), torch.full((2, 2), 1000.0)])
    assert with_new_rows(
        matrix, 4, 6, [MappedToken(4, (0,), (1.0,))], "mean_all", "input", 0.02, 1
    )[4].tolist() == [3.0, 3.0]


def test_random_rows_have_the_models_deviation_and_differ_between_sides_and_seeds_only() -> None:
    new = [MappedToken(2 + i, (0,), (1.0,)) for i in range(2000)]
    make = [with_new_rows(torch.zeros(2, 64), 2, 2002, new, "random", side, 0.02,
    seed)[2:] for side, seed in
            (("input", 1), ("input", 1), ("output", 1), ("input", 2))]  # fmt: skip
    assert make[0].equal(make[1]) and not make[0].equal(make[2]) and not make[0].equal(make[3])
    assert abs(float(make[0].std()) / 0.02 - 1) < 0.02 and abs(float(make[0].mean())) < 1e-3


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_after_extension_the_logits_of_the_old_tokens_are_the_same_bit_for_bit(
    pool: Pool, folders: Folders, runs: Folders, family: str, tmp_path: Path
) -> None:
    base = folders(family)
    folder = extended(tmp_path / "tokenizer", base, family)
    words = ["--load-dir", base, "--save-dir", tmp_path / "run", "--tokenizer-folder", folder]
    ((code, out, err),) = pool.run(1, tool, *words)
    assert code == 0 and "3 rows added: input mean" in out, err
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=base)
    rows = [tokenizer.encode(text) for text in TEXTS]
    (before,) = pool.run(1, run_logits, runs(family), rows)
    (after,) = pool.run(1, run_logits, tmp_path / "run", rows)
    size = {"mistral": 460, "qwen2": 480}[family]
    for a, b in zip(before, after, strict=True):
        assert b.shape[1] == size and np.array_equal(a[:, :457], b[:, :457])
    ((code, _, err),) = pool.run(
        1, tool, "--load-dir", tmp_path / "run", "--save-dir", tmp_path / "back"
    )
    assert code == 0, err
    old, new = tensors(base), tensors(tmp_path / "back")
    for name, tensor in old.items():
        assert (
            new[name][:457].equal(tensor[:457])
            if tensor.shape[0] in (457, 480)
            else new[name].equal(tensor)
        ), name
    pieces = tokenizer.encode(ADDED[1])
    exact = old["model.embed_tokens.weight"][pieces].double().mean(0)
    assert torch.allclose(
        new["model.embed_tokens.weight"][458].double(), exact, rtol=2**-7, atol=1e-6
    )
    if family == "mistral":
        weights = torch.tensor(shares(tokenizer, pieces), dtype=torch.float64)
        exact = (old["lm_head.weight"][pieces].double() * weights[:, None]).sum(0) / weights.sum()
        assert torch.allclose(new["lm_head.weight"][458].double(), exact, atol=1e-6)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == size
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    assert len(greedy(tmp_path / "back", [457, 458], 3)) == 3


def test_replaced_tokens_get_new_rows_in_the_old_places(
    pool: Pool, folders: Folders, tmp_path: Path
) -> None:
    base = folders("mistral")
    folder = extended(tmp_path / "tokenizer", base, "mistral", kind="replace")
    words = ["--tokenizer-folder", folder, "--new-rows", "mean_all", "--new-output-rows", "random"]
    ((code, out, err),) = pool.run(
        1, tool, "--load-dir", base, "--save-dir", tmp_path / "run", *words
    )
    assert code == 0 and "3 rows replaced: input mean_all, output random" in out, err
    pool.run(1, tool, "--load-dir", tmp_path / "run", "--save-dir", tmp_path / "back")
    old, new = tensors(base), tensors(tmp_path / "back")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        same = (old[name] == new[name]).all(1)
        assert (~same).nonzero().flatten().tolist() == [300, 301, 302]
    assert torch.allclose(
        new["model.embed_tokens.weight"][301].double(),
        old["model.embed_tokens.weight"].double().mean(0),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 2}, "version 2"),
        ({"kind": "shrink"}, "kind 'shrink'"),
        ({"vocab_size": 461}, "the new ids are not 457 to 460"),
        ({"new": [{"id": 457}]}, "is damaged"),
        (
            {"base_vocab_size": 459, "new": [{"id": 459, "pieces": [470], "chars": [1.0]}]},
            "pieces outside the base vocabulary",
        ),
        (
            {"base_vocab_size": 459, "new": [{"id": 459, "pieces": [1, 2], "chars": [1.0]}]},
            "has 2 pieces and 1 lengths",
        ),
        ({"kind": "replace", "vocab_size": 458}, "a replacement leaves the size"),
    ],
)
def test_a_token_map_that_contradicts_itself_is_refused(
    folders: Folders, tmp_path: Path, changes: dict, named: str
) -> None:
    folder = extended(tmp_path / "tokenizer", folders("mistral"), "mistral", **changes)
    with pytest.raises(ChatflowError) as error:
        read_token_map(folder)
    assert named in str(error.value)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    pool: Pool, folders: Folders, tmp_path: Path
) -> None:
    base = folders("mistral")
    good = extended(tmp_path / "good", base, "mistral")
    other = extended(tmp_path / "other", base, "mistral", base_sha256="0" * 64)
    without = tmp_path / "without"
    write_tokenizer(without, "mistral", ADDED)
    smaller = extended(tmp_path / "smaller", base, "mistral")
    write_tokenizer(smaller, "mistral", ADDED[:2])
    for load, folder, words, named in (
        (base, other, [], "made from a tokenizer with the sha256"),
        (base, without, [], "has no token_map.json"),
        (base, smaller, [], "the tokenizer has 459 tokens and its token_map.json says 460"),
        (folders("qwen2"), good, ["--new-output-rows", "random"], "has no effect"),
        (base, tmp_path / "nowhere", [], "has no token_map.json"),
    ):
        ((code, _, err),) = pool.run(
            1,
            tool,
            "--load-dir",
            load,
            "--save-dir",
            tmp_path / "out",
            "--tokenizer-folder",
            folder,
            *words,
        )
        assert code == 2 and named in err, err
    assert not (tmp_path / "out").exists()
