"""README.md as a package index shows it: away from the repository, where its links lead nowhere.

With FASTRNN_REPOSITORY, the repository's address, links and pictures become absolute. Without it,
links become plain text and pictures are left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# Code, which stays, or a picture or link whose text holds no other link; not one with an address or
# to a heading. Which of them begins first counts: a link's text may be code.
CODE_OR_LINK = re.compile(
    r"^```.*?^```$|`[^`\n]+`|"
    r"(?P<picture>!?)\[(?P<label>(?:`[^`\n]+`|[^\[\]`])*)\]\((?![a-z]+:|#)(?P<target>[^()\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def absolute(text: str, repository: str) -> str:
    """The text without relative links; repository may be empty."""

    def replace(match: re.Match[str]) -> str:
        picture, label, target = match.group("picture", "label", "target")
        if target is None:
            return match[0]
        if not repository:
            return "" if picture else label
        kind = "raw" if picture else "blob"
        return f"{picture}[{label}]({repository.rstrip('/')}/{kind}/HEAD/{target})"

    return CODE_OR_LINK.sub(replace, text)


def dynamic_metadata(field: str, settings: dict[str, Any], project: Any = None) -> dict[str, str]:
    """The field `readme` of the package's metadata, for scikit-build-core."""
    if field != "readme":
        raise ValueError(f"field: expected readme, got {field}")
    text = Path("README.md").read_text(encoding="utf-8")
    repository = os.environ.get("FASTRNN_REPOSITORY", "")
    return {"text": absolute(text, repository), "content-type": "text/markdown"}
