"""Vocabularies for a new language: extended, or with new tokens in place of the least used ones.

Both continue the merges of the vocabulary (arXiv 2512.03989). The new tokens merge after all old
ones, so they can all be reached, and a text in which none of them occurs keeps its tokens.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chatflow.errors import TokenizerError
from megatron_chatflow.tokenizer.base import read_bytes
from megatron_chatflow.tokenizer.bpe_continuation import LearnedToken, continue_merges
from megatron_chatflow.tokenizer.bytelevel_vocabulary import ByteLevelVocabulary
from megatron_chatflow.tokenizer.merge_candidates import (
    NEW_SYMBOL,
    UNKNOWN_CHARACTER,
    SymbolRuns,
    SymbolText,
    TargetCharacters,
    find_target,
)
from megatron_chatflow.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from megatron_chatflow.tokenizer.vocabulary_base import NewToken, Vocabulary

SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
EXTENDABLE = (*SENTENCEPIECE, "HuggingFaceTokenizer")

Texts = Callable[[], Iterable[Sequence[str]]]
"""Yields the documents of a corpus from the first to the last, in batches, at every call."""


@dataclass(frozen=True)
class ExtensionResult:
    """A changed vocabulary.

    Attributes:
        vocabulary: the changed one.
        new: the new tokens, in the order in which they were learned.
        removed: ids whose old tokens are gone.
        other_script: whether the new tokens are of other scripts than Latin, so that Latin text
            keeps its tokens.
        joined: scripts whose marks count as letters now and did not before.
        before: the old tokens with the marks of these scripts joined; the base where there are
            none.
    """

    vocabulary: Vocabulary
    new: list[NewToken]
    removed: list[int]
    other_script: bool
    joined: list[str]
    before: Vocabulary


def open_vocabulary(tokenizer_type: str, path: str) -> Vocabulary:
    """Open a tokenizer that `load_tokenizer` has opened before.

    Args:
        tokenizer_type: Megatron's name.
        path: the `.model` or `tokenizer.json`.

    Raises:
        TokenizerError: the tokenizer is of a kind that cannot be extended.
    """
    if tokenizer_type not in EXTENDABLE:
        raise TokenizerError(
            f"tokenizer_type {tokenizer_type} cannot be extended: give a SentencePiece BPE "
            f"model (SentencePieceTokenizer, Llama2Tokenizer) "
            "or a byte-level tokenizer.json (HuggingFaceTokenizer)"
        )
    kind = SentencePieceVocabulary if tokenizer_type in SENTENCEPIECE else ByteLevelVocabulary
    return kind(tokenizer_type, path, read_bytes(tokenizer_type, "tokenizer_model", path))


def extend(
    base: Vocabulary,
    corpus: Texts,
    count: int,
    characters: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> ExtensionResult:
    """Add tokens after the last id.

    Args:
        base: the vocabulary.
        corpus: text of the new language.
        count: how many tokens to add.
        characters: add single characters only, the most frequent first; in a byte-level vocabulary
            also the bytes that several begin with.
        progress: called with how many tokens are learned.

    Raises:
        TokenizerError: the corpus has fewer candidates, or characters of it would still be lost.
    """
    target = _find_target(corpus)
    joined = [] if characters else base.cut_scripts(target.marked)
    before = base.with_joined_marks(joined)
    learned, text, lost = _learn(before, target, corpus, count, characters, progress)
    _check_enough(len(learned), count)
    _check_nothing_lost(lost)
    new = _tokens(learned, text, range(base.size, base.size + count))
    return ExtensionResult(
        _checked(before.changed((), new), new), new, [], target.other_script, joined, before
    )


def replace(
    base: Vocabulary,
    corpus: Texts,
    base_corpus: Texts,
    count: int,
    progress: Callable[[int], None] = lambda done: None,
) -> ExtensionResult:
    """Put new tokens in the place of the least used ones (after Csaki et al., arXiv 2311.05741).

    The size does not change. A token's use is its share of the tokens of the old language's text
    and its share of those of the new one's, added, so that tokens which the new language needs are
    kept too.

    Args:
        base: the vocabulary.
        corpus: text of the new language.
        base_corpus: text of the language whose tokens are to be kept.
        count: how many tokens to replace.
        progress: called with how many tokens are learned.

    Raises:
        TokenizerError: fewer tokens can be removed, or the corpus has fewer candidates, or
            characters of a corpus would be lost.
    """
    target = _find_target(corpus)
    joined = base.cut_scripts(target.marked)
    before = base.with_joined_marks(joined)
    usage = _shares(before, base_corpus) + _shares(before, corpus)
    removed = least_used(before, usage, count)
    if len(removed) < count:
        raise TokenizerError(
            f"--new-tokens {count} is more than can be replaced: {len(removed)} tokens are "
            f"neither control tokens nor bytes; give at most that"
        )
    pruned = before.changed(removed, ())
    learned, text, lost = _learn(pruned, target, corpus, count, False, progress)
    _check_enough(len(learned), count)
    _check_nothing_lost(lost)
    new = _tokens(learned, text, removed)
    vocabulary = _checked(before.changed(removed, new), new)
    return ExtensionResult(vocabulary, new, removed, target.other_script, joined, before)


def least_used(vocabulary: Vocabulary, usage: np.ndarray, wanted: int) -> list[int]:
    """Choose the least used tokens that nothing else needs.

    A token that a kept one is merged from is kept, else that one could not be reached. So tokens
    are taken one by one, always the least used of those that no remaining token is merged from (of
    equally used ones the last), which may free its parts. Control and added tokens, bytes and
    single-byte tokens are never taken.

    Args:
        vocabulary: the tokens.
        usage: how much each id is used float[size].
        wanted: how many to choose.

    Returns:
        The ids, ascending; fewer than `wanted` where no more can be taken.
    """
    parts = vocabulary.parts()
    needed = np.zeros(vocabulary.size, np.int64)
    for each in parts:
        for part in set(each):
            needed[part] += 1
    heap = [(float(usage[i]), -i) for i in vocabulary.removable() if not needed[i]]
    heapq.heapify(heap)
    taken: list[int] = []
    while heap and len(taken) < wanted:
        token = -heapq.heappop(heap)[1]
        taken.append(token)
        for part in set(parts[token]):
            needed[part] -= 1
            if not needed[part] and not vocabulary.fixed[part]:
                heapq.heappush(heap, (float(usage[part]), -part))
    return sorted(taken)


def _find_target(corpus: Texts) -> TargetCharacters:
    target = find_target(corpus())
    if not target.kinds:
        raise TokenizerError(
            "the corpus has no letters, so there is nothing to learn: check --input and --json-keys"
        )
    return target


def _learn(
    vocabulary: Vocabulary,
    target: TargetCharacters,
    corpus: Texts,
    count: int,
    characters: bool,
    progress: Callable[[int], None],
) -> tuple[list[LearnedToken], SymbolText, list[str]]:
    """Return the new tokens, the text of each symbol, and the characters still lost."""
    text = SymbolText(vocabulary.text)
    chunks = SymbolRuns(target)
    lost: set[str] = set()
    for batch in corpus():
        symbols, ends = vocabulary.encode(batch)
        chunks.add(symbols, ends, text, within_characters=characters)
        lost |= vocabulary.lost(batch, symbols)
    allowed = vocabulary.may_be_added(target)
    learned = continue_merges(
        chunks.counts, text, count, allowed, by_count=characters, progress=progress
    )
    lost -= {chr(token.left - UNKNOWN_CHARACTER) for token in learned if token.right is None}
    return learned, text, sorted(lost)


def _check_enough(found: int, count: int) -> None:
    if found < count:
        raise TokenizerError(
            f"--new-tokens {count} is more than the corpus holds: {found} candidates occur "
            f"at least twice; give at most that, or more text"
        )


def _check_nothing_lost(lost: Sequence[str]) -> None:
    if lost:
        some = ", ".join(map(repr, lost[:5])) + ", ..." * (len(lost) > 5)
        raise TokenizerError(
            f"the tokenizer would lose {len(lost)} characters of the corpus ({some}), for "
            f"which it has neither tokens nor bytes: "
            "give a larger --new-tokens if they are letters, take them out of the text, or "
            "start from a tokenizer with byte fallback"
        )


def _tokens(
    learned: Sequence[LearnedToken], text: SymbolText, ids: Sequence[int]
) -> list[NewToken]:
    return [
        NewToken(
            i,
            text[NEW_SYMBOL + n],
            text[token.left],
            None if token.right is None else text[token.right],
        )
        for n, (token, i) in enumerate(zip(learned, ids, strict=True))
    ]


def _checked(vocabulary: Vocabulary, new: Sequence[NewToken]) -> Vocabulary:
    unreachable = vocabulary.unreachable([token.id for token in new])
    assert not unreachable, [vocabulary.text[i] for i in unreachable[:10]]
    return vocabulary


def _shares(vocabulary: Vocabulary, corpus: Texts) -> np.ndarray:
    """Return the share of each id in the tokens of a corpus: float64 [size]."""
    counts = np.zeros(vocabulary.size, np.int64)
    for batch in corpus():
        symbols, _ = vocabulary.encode(batch)
        counts += np.bincount(symbols[symbols < vocabulary.size], minlength=vocabulary.size)
    return counts / max(1, counts.sum())
