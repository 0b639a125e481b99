"""Parts of pages that are made from the code itself when the docs are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


def write(name: str, text: str) -> None:
    """Write a part, and leave an unchanged one alone (Sphinx would read its page again)."""
    path = DOCS / name
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def make_parts(app: Any) -> None:
    write("guide/paths.inc.md", "(table)\n")


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", make_parts)
    return {"parallel_read_safe": True}
