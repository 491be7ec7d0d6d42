"""Markdown pages of the project, their links and anchors."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Return every Markdown page of the project."""
    folders = ("asgd", "cluster", "analysis", "scripts", "tests")
    inside = (path for folder in folders for path in (ROOT / folder).rglob("*.md"))
    return sorted([*ROOT.glob("*.md"), *inside])


def links(page: Path) -> list[str]:
    """Return the targets of a page's links within this project."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return [to for to in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in to]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's titles, as GitHub makes them."""
    found: list[str] = []
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.append(plain if plain not in found else f"{plain}-{found.count(plain)}")
    return set(found)
