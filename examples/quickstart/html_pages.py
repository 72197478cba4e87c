"""Read the text blocks of HTML pages, for build_corpora.py; only the standard library is needed."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

CHINESE = re.compile(r"[\u3400-\u9fff]")
LATIN = re.compile(r"[A-Za-z]")


class Block(NamedTuple):
    """A leaf of a page: the id of its element (or ""), the element's name, and its text."""

    key: str
    tag: str
    text: str


class Pages(HTMLParser):
    """Collects the text blocks of one HTML page in document order.

    Args:
        area: id of the element to read; None reads the body.
    """

    BLOCKS = frozenset(
        [
            "p",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "li",
            "dt",
            "dd",
            "td",
            "th",
            "tr",
            "table",
            "ul",
            "ol",
            "dl",
            "caption",
            "pre",
            "blockquote",
            "div",
            "section",
            "article",
            "body",
        ]
    )
    DROPPED = frozenset(
        [
            "script",
            "style",
            "header",
            "footer",
            "nav",
            "aside",
            "noscript",
            "button",
            "form",
            "svg",
            "iframe",
            "title",
        ]
    )
    VOID = frozenset(
        [
            "area",
            "base",
            "br",
            "col",
            "embed",
            "hr",
            "img",
            "input",
            "link",
            "meta",
            "source",
            "track",
            "wbr",
        ]
    )

    def __init__(self, area: str | None):
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._area = area
        self._open: list[tuple[str, str, bool, bool]] = []  # tag, id, inside the area, dropped
        self._text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag in self.VOID:
            self.handle_data("\n" if tag == "br" else "")
            return
        given = {name: value or "" for name, value in attrs}
        if tag in self.BLOCKS:
            self._flush()
        inside, dropped = (self._open[-1][2], self._open[-1][3]) if self._open else (False, False)
        inside = inside or (given.get("id") == self._area if self._area else tag == "body")
        navigation = given.get("class") in ("navheader", "navfooter")
        other_system = given.get("hidden") == "true" and "MAC" in given.get("class", "")
        self._open.append(
            (
                tag,
                given.get("id", ""),
                inside,
                dropped or tag in self.DROPPED or navigation or other_system,
            )
        )

    def handle_endtag(self, tag):
        if tag in self.BLOCKS:
            self._flush()
        if any(entry[0] == tag for entry in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data):
        if self._open and self._open[-1][2] and not self._open[-1][3]:
            self._text.append(data)

    def _flush(self):
        text = "".join(self._text).replace("\xa0", " ").replace("\u200b", "").replace("\xad", "")
        self._text.clear()
        tag, key = next(
            ((entry[0], entry[1]) for entry in reversed(self._open) if entry[0] in self.BLOCKS),
            ("", ""),
        )
        text = (
            "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))
            if tag == "pre"
            else " ".join(text.split())
        )
        if text.strip():
            self.blocks.append(Block(key, tag, text))


def read_page(path: Path, area: str | None = None) -> list[Block]:
    """The text blocks of an HTML file; those from the list of related pages on are left out."""
    parser = Pages(area)
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    end = next(
        (
            i
            for i, block in enumerate(parser.blocks)
            if block.text in ("Related Topics", "相关主题")
        ),
        None,
    )
    return parser.blocks[:end]


def is_chinese(text: str) -> bool:
    """Whether a paragraph is Chinese: an untranslated one in a Chinese page is not."""
    characters = len(CHINESE.findall(text))
    return characters >= 2 and characters * 3 >= len(LATIN.findall(text))
