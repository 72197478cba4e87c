"""Text to sentences: NLTK's Punkt where its data is on this machine, else rules.

Nothing is ever downloaded.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from megatron_chatflow.errors import DataError

NLTK_LANGUAGES = (
    *(
        "czech",
        "danish",
        "dutch",
        "english",
        "estonian",
        "finnish",
        "french",
        "german",
        "greek",
        "italian",
    ),
    *(
        "malayalam",
        "norwegian",
        "polish",
        "portuguese",
        "russian",
        "slovene",
        "spanish",
        "swedish",
        "turkish",
    ),
)
"""Languages that Punkt has a model for."""

Cuts = Callable[[str], Iterator[int]]
"""Yields where a text can be cut, in ascending order."""


@dataclass(frozen=True)
class SentenceSplitting:
    """How documents are split into sentences.

    Attributes:
        lang: the language, in Megatron's words (`english`).
        method: `punkt`, or the name of a rule: `ideographic`, `thai`, `general`.
        keep_newlines: whether sentences keep the white space that follows them; otherwise, the
            white space between sentences is left out.
    """

    lang: str
    method: str
    keep_newlines: bool


def choose_splitting(lang: str, keep_newlines: bool) -> SentenceSplitting:
    """Return how a language is split on this machine.

    Raises:
        DataError: the language is unknown.
    """
    if lang in NLTK_LANGUAGES:
        return SentenceSplitting(lang, "punkt" if _punkt(lang) else "general", keep_newlines)
    if lang not in _RULE_OF:
        raise DataError(
            f"--lang {lang} is unknown to --split-sentences: give one of "
            f"{', '.join(sorted({*NLTK_LANGUAGES, *_RULE_OF}))}"
        )
    return SentenceSplitting(lang, _RULE_OF[lang], keep_newlines)


def without_punkt(splitting: SentenceSplitting) -> str:
    """Return the message for a language whose Punkt data is not on this machine."""
    return (
        f"NLTK has no data for {splitting.lang} here, so sentences are split by a rule "
        f"(docs/corpora.md#sentences): to have NLTK's, run "
        "`python -m nltk.downloader punkt_tab` where there is a network, and set NLTK_DATA "
        "to the folder it fills"
    )


def splitter(splitting: SentenceSplitting) -> Callable[[str], list[str]]:
    """Return the function that splits a text into its sentences.

    White space alone is left out.
    """
    cuts = _punkt(splitting.lang) if splitting.method == "punkt" else _RULES[splitting.method]
    assert cuts is not None, "the data of NLTK was there when the run began"
    keep = splitting.keep_newlines

    def split(text: str) -> list[str]:
        pieces = (text[start:end] for start, end in pairwise([0, *cuts(text), len(text)]))
        return [
            piece if keep else piece.strip() for piece in pieces if piece and not piece.isspace()
        ]

    return split


def _punkt(lang: str) -> Cuts | None:
    from nltk.tokenize.punkt import PunktTokenizer  # takes half a second

    try:
        tokenizer = PunktTokenizer(lang)
    except LookupError:
        return None
    return lambda text: (start for start, _ in tokenizer.span_tokenize(text))


_CLOSING = "”’」』》〉）】｣)\\]"
_IDEOGRAPHIC = re.compile(rf"[。！？；｡]+[{_CLOSING}]*\s*|\n\s*")


def _ideographic(text: str) -> Iterator[int]:
    """Yield cuts after 。！？； with the quotes and brackets that they close, and at line ends.

    A straight quote closes when an odd number of them precedes it in the sentence.
    """
    start = 0
    for match in _IDEOGRAPHIC.finditer(text):
        end = match.end()
        if text.startswith('"', end) and text.count('"', start, end) % 2:
            end += 1
        yield end
        start = end


_THAI = re.compile(
    r"(?<![.!?])[.!?]++[\"'”’)]*\s++|(?<=[\u0e00-\u0e7f]) ++(?=[\u0e00-\u0e7f])|\n\s*"
)


def _thai(text: str) -> Iterator[int]:
    """Yield cuts at line ends, after .!? and white space, and at spaces between two Thai letters.

    Thai has no sentence mark and sets no other spaces there. Spaces around numbers and foreign
    words are not cuts.
    """
    return (match.end() for match in _THAI.finditer(text))


_GENERAL = re.compile(r"(?<![.!?…])([.!?…]++)[\"'”’»)\]]*\s++(?=[\"'“‘«„(\[¿¡]*(\S))|\n\s*\n\s*")
_ABBREVIATIONS = frozenset(
    (
        "al",
        "art",
        "ca",
        "cf",
        "dr",
        "fig",
        "ill",
        "jr",
        "kb",
        "mr",
        "mrs",
        "ms",
        "nr",
        "pl",
        "pp",
        "prof",
        "sr",
        "st",
        "ún",
        "vol",
        "vs",
    )
)
_LONGEST = 20


def _general(text: str) -> Iterator[int]:
    """Yield cuts at empty lines, and after .!?… and white space unless a small letter follows.

    A full stop does not end one after one letter, one or two digits, a word with a full stop
    inside, or a common abbreviation.
    """
    for match in _GENERAL.finditer(text):
        mark, following = match.groups(default="")
        if not following.islower() and not (
            mark == "." and _abbreviated(text[max(0, match.start() - _LONGEST) : match.start()])
        ):
            yield match.end()


def _abbreviated(before: str) -> bool:
    word = re.split(r"\s", before)[-1].lstrip("\"'“‘«„([").casefold()
    return (
        "." in word
        or len(word) == 1
        or (word.isdigit() and len(word) <= 2)
        or word in _ABBREVIATIONS
    )


_RULES: dict[str, Cuts] = {"ideographic": _ideographic, "thai": _thai, "general": _general}
_RULE_OF = {
    "chinese": "ideographic",
    "japanese": "ideographic",
    "thai": "thai",
    "hungarian": "general",
}
