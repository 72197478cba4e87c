"""mkdocs hook: README.md is the site's first page, and links leave the site where they must.

Pages link to each other and to files of the repository by relative paths, so that they also work
in a clone. Links to files outside docs/ become plain code on the site, after a check that the file
exists.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as index.md."""
    text = (Path(config.docs_dir).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files outside docs/ by their text."""
    docs = Path(config.docs_dir).resolve()
    base = docs.parent if page.file.src_uri == "index.md" else docs

    def replace(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        if files.get_file_from_path(target) is not None:
            return match[0]
        path = (base / target).resolve()
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        return f"{text} (`{path.relative_to(docs.parent)}`)"

    return LINK.sub(replace, markdown)
