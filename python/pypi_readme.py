"""README.md as a package index shows it: away from the repository, where its links lead nowhere.

With FASTRNN_REPOSITORY, the repository's address, links and pictures become absolute. Without it,
links become plain text and pictures are left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# A picture, or a link whose text holds no other; not one with an address or to a heading.
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?![a-z]+:|#)([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def absolute(text: str, repository: str) -> str:
    """The text without relative links; repository may be empty."""

    def replace(link: re.Match[str]) -> str:
        picture, label, target = link.groups()
        if not repository:
            return "" if picture else label
        kind = "raw" if picture else "blob"
        return f"{picture}[{label}]({repository.rstrip('/')}/{kind}/HEAD/{target})"

    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [LINK.sub(replace, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join(parts) + LINK.sub(replace, text[end:])


def dynamic_metadata(field: str, settings: dict[str, Any], project: Any = None) -> dict[str, str]:
    """The field `readme` of the package's metadata, for scikit-build-core."""
    if field != "readme":
        raise ValueError(f"field: expected readme, got {field}")
    text = Path("README.md").read_text(encoding="utf-8")
    repository = os.environ.get("FASTRNN_REPOSITORY", "")
    return {"text": absolute(text, repository), "content-type": "text/markdown"}
