"""The small files that stand beside a tokenizer."""

import json
import os
import shutil
from typing import Any

_NAMES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_companions(source: str, folder: str) -> list[str]:
    """Copies what stands beside a tokenizer's file and does not depend on its tokens into another
    folder; returns the names.
    """
    beside = os.path.dirname(os.path.abspath(source))
    found = [name for name in _NAMES if os.path.isfile(os.path.join(beside, name))]
    for name in found:
        shutil.copyfile(os.path.join(beside, name), os.path.join(folder, name))
    return found


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON file as people read it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
