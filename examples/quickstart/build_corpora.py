#!/usr/bin/env python3
"""Rebuild the sample corpora in data/ from Debian's packages and the Python package index.

    python build_corpora.py                   # write data/*.jsonl
    python build_corpora.py --check           # build elsewhere and compare with data/ byte for byte
    python build_corpora.py --packages DIR    # keep the downloads in DIR and reuse them

Needs a Debian 12 system (apt-get, dpkg) and pip; of Python only the standard library. Nothing is
drawn at random: documents are put in the order of a hash of their source, so the same packages give
the same bytes. Each page of a source goes to one file only, and a longer paragraph that is already
in a file is left out of its later pages, so that the held-out part of a file does not repeat its
training part.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from html_pages import Block, is_chinese, read_page

HERE = Path(__file__).resolve().parent
DEBIAN = {
    "libreoffice-help-en-us": "4:7.4.7-1+deb12u14",
    "libreoffice-help-zh-cn": "4:7.4.7-1+deb12u14",
    "postgresql-doc-15": "15.20-0+deb12u1",
}
PYPI = {"zaragoza-construction-faq": "1.2.1"}

HELP, DATABASE, FAQ = "libreoffice-help", "postgresql-doc", "zaragoza-construction-faq"
BUDGETS = {
    ("en", HELP): 520_000,
    ("en", DATABASE): 380_000,
    ("zh", HELP): 720_000,
    ("en-zh", HELP): 700_000,
    ("instruct", HELP): 270_000,
    ("instruct", FAQ): 150_000,
}
"""Bytes of each file taken from each source."""

APPLICATIONS = {
    "sbasic": "LibreOffice Basic",
    "scalc": "LibreOffice Calc",
    "sdraw": "LibreOffice Draw",
    "simpress": "LibreOffice Impress",
    "smath": "LibreOffice Math",
    "swriter": "LibreOffice Writer",
}


def digest(text: str) -> str:
    """The key by which documents are ordered and pages are dealt to files."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_of(page: str) -> tuple[str, str]:
    """Which file, and which language of it, a page of the help goes to: how-to pages are
    instructions, the others are dealt 3:3:4.
    """
    number = int(digest("page of " + page), 16)
    if "/guide/" in page:
        return "instruct", "en" if number % 2 else "zh"
    return (
        ("en-zh", "both") if number % 10 < 3 else ("en", "en") if number % 10 < 6 else ("zh", "zh")
    )


def document(
    blocks: Iterable[Block], seen: set[str], least: int, most: int, chinese: bool = False
) -> str | None:
    """The page as text without the longer paragraphs of earlier pages; None when it has fewer than
    `least` or more than `most` characters.
    """
    long = 15 if chinese else 40
    kept = []
    for block in blocks:
        if chinese and not is_chinese(block.text) or len(block.text) >= long and block.text in seen:
            continue
        kept.append(block.text)
    text = "\n".join(kept)
    if not least <= len(text) <= most:
        return None
    seen.update(kept)
    return text


def help_records(english: Path, chinese: Path) -> Iterator[tuple[str, str, list[dict]]]:
    """LibreOffice's help as (file, source, records of one page), pages in the order of their
    hash.
    """
    seen: dict[str, set[str]] = {"en": set(), "zh": set(), "en-zh": set(), "instruct": set()}
    pages = (path.relative_to(english).as_posix() for path in english.rglob("*.html"))
    for page in sorted(pages, key=digest):
        if not (chinese / page).exists():
            continue
        name, language = file_of(page)
        source = f"{HELP}/{page}"
        a, b = read_page(english / page, "DisplayArea"), read_page(chinese / page, "DisplayArea")
        if name == "en-zh":
            yield (
                name,
                source,
                [{"en": x, "zh": y, "source": source} for x, y in aligned(a, b, seen[name])],
            )
        elif name == "instruct":
            yield (
                name,
                source,
                how_to(page, a if language == "en" else b, language, seen[name], source),
            )
        else:
            text = (
                document(a, seen[name], 250, 9000)
                if name == "en"
                else document(b, seen[name], 90, 4000, chinese=True)
            )
            yield name, source, [{"text": text, "source": source}] if text else []


def aligned(
    english: list[Block], chinese: list[Block], seen: set[str]
) -> Iterator[tuple[str, str]]:
    """Paragraph pairs of a page: the same element id on both sides, translated, of a plausible
    length, not in an earlier page.
    """
    translation = {block.key: block.text for block in chinese if block.key}
    for block in english:
        text = translation.get(block.key, "")
        if len(block.text.split()) < 4 or not is_chinese(text) or block.text in seen:
            continue
        if 0.25 < len(text.encode()) / len(block.text.encode()) < 4:
            seen.add(block.text)
            yield block.text, text


def how_to(
    page: str, blocks: list[Block], language: str, seen: set[str], source: str
) -> list[dict]:
    """A how-to page as an instruction: its title is the question, its text the answer."""
    if len(blocks) < 2 or language == "zh" and not is_chinese(blocks[0].text):
        return []
    answer = (
        document(blocks[1:], seen, 80, 900)
        if language == "en"
        else document(blocks[1:], seen, 40, 380, chinese=True)
    )
    if answer is None:
        return []
    application = APPLICATIONS.get(page.split("/")[0], "LibreOffice")
    question = (
        f"How do I do this in {application}: {blocks[0].text}?"
        if language == "en"
        else f"在 {application} 中如何操作：{blocks[0].text}？"
    )
    return [{"instruction": question, "input": "", "output": answer, "source": source}]


def database_records(folder: Path) -> Iterator[tuple[str, str, list[dict]]]:
    """PostgreSQL's manual as (file, source, records of one page)."""
    seen: set[str] = set()
    for path in sorted(folder.glob("*.html"), key=lambda path: digest(path.name)):
        text = document(read_page(path), seen, 400, 12_000)
        source = f"{DATABASE}/{path.name}"
        yield "en", source, [{"text": text, "source": source}] if text else []


def faq_records(path: Path) -> Iterator[tuple[str, str, list[dict]]]:
    """The construction FAQ as conversations of two questions of one category; answers that
    advertise their author are left out.
    """
    categories: dict[str, list[dict]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["questions"]:
        if "Zaragoza" not in entry["q"] + entry["a"]:
            categories.setdefault(entry["category"], []).append(entry)
    for entries in categories.values():
        for pair in zip(entries[::2], entries[1::2], strict=False):
            turns = [
                turn
                for entry in pair
                for turn in (
                    {"role": "user", "content": entry["q"]},
                    {"role": "assistant", "content": entry["a"]},
                )
            ]
            source = f"{FAQ}/{pair[0]['id']}+{pair[1]['id']}"
            yield "instruct", source, [{"messages": turns, "source": source}]


def build(sources: Iterable[tuple[str, str, list[dict]]]) -> dict[str, bytes]:
    """The content of each file: pages within the budgets, in the order of their hash, a page's
    records together.
    """
    files: dict[str, list[tuple[str, bytes]]] = {}
    used = dict.fromkeys(BUDGETS, 0)
    for name, source, records in sources:
        lines = "".join(
            json.dumps(record, ensure_ascii=False) + "\n" for record in records
        ).encode()
        account = (name, source.split("/")[0])
        if lines and used[account] + len(lines) <= BUDGETS[account]:
            used[account] += len(lines)
            files.setdefault(name, []).append((digest(source), lines))
    return {
        f"{name}.jsonl": b"".join(lines for _, lines in sorted(pages))
        for name, pages in files.items()
    }


def fetch(folder: Path) -> dict[str, Path]:
    """Downloads what is not in `folder` yet and unpacks everything; package name -> folder.

    Raises:
        SystemExit: when a package is not to be had in the version that the files were made from.
    """
    unpacked = {}
    for name, version in (DEBIAN | PYPI).items():
        pattern = f"{name}_*.deb" if name in DEBIAN else f"{name.replace('-', '_')}-*.whl"
        if not list(folder.glob(pattern)):
            print(f"download {name} {version}", flush=True)
            apt = ["apt-get", "download", "-qq", f"{name}={version}"]
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}"]
            if subprocess.run(apt if name in DEBIAN else pip, cwd=folder).returncode:
                raise SystemExit(
                    f"{name} {version} could not be downloaded: run apt-get update first, "
                    f"or, if a newer version has taken its place, "
                    f"put that one into the folder given as --packages and expect other bytes"
                )
        [package] = folder.glob(pattern)
        unpacked[name] = folder / "unpacked" / name
        if name in DEBIAN:
            unpacked[name].mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg", "-x", package, unpacked[name]], check=True)
        else:
            zipfile.ZipFile(package).extractall(unpacked[name])
    return unpacked


def corpora(unpacked: dict[str, Path]) -> dict[str, bytes]:
    """All files, from the unpacked packages."""
    text = "usr/share/libreoffice/help/{}/text"
    english, chinese = (
        unpacked["libreoffice-help-en-us"] / text.format("en-US"),
        unpacked["libreoffice-help-zh-cn"] / text.format("zh-CN"),
    )

    def sources() -> Iterator[tuple[str, str, list[dict]]]:
        yield from help_records(english, chinese)
        yield from database_records(
            unpacked["postgresql-doc-15"] / "usr/share/doc/postgresql-doc-15/html"
        )
        yield from faq_records(
            unpacked["zaragoza-construction-faq"] / "zaragoza_construction_faq/data/faq-en.json"
        )

    return build(sources())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with data/ instead of writing it; exit code 1 if a byte differs",
    )
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="folder for the downloads (default: a temporary one)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.packages or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = corpora(fetch(folder))
    differ = False
    for name, content in sorted(files.items()):
        path = HERE / "data" / name
        same = path.exists() and path.read_bytes() == content
        differ |= not same
        print(
            f"{name}: {content.count(bytes([10]))} lines, {len(content)} bytes, "
            f"{'as in' if same else 'other than'} data/"
        )
        if not arguments.check:
            path.write_bytes(content)
    return int(arguments.check and differ)


if __name__ == "__main__":
    sys.exit(main())
