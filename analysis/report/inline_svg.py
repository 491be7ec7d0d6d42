"""Inlines figures into a page: page colours, shared glyphs, unique ids."""

from __future__ import annotations

import re

from analysis.figures.canvas import BAND

# CSS names of the colours, so that a dark theme can change them.
_COLOURS = {
    "#1b1b1f": "currentColor",
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--orange)",
    "#009e73": "var(--green)",
    "#cc79a7": "var(--pink)",
    "#56b4e9": "var(--sky)",
    "#e69f00": "var(--amber)",
    "#bbbbbb": "var(--bar)",
    "#999999": "var(--soft)",
}
_BAND = f"opacity: {BAND}"  # a dark theme uses a higher opacity
# Matplotlib repeats glyphs in every figure; no library shares them within a page.
_GLYPH = re.compile(r'<path id="([^"]*)"(?: d="[^"]*")? transform="scale\(0\.015625\)"/>')
_ID = re.compile(r' id="([^":]*)"')
_REFERENCE = re.compile(r'(?:href="#|url\(#)([^")]*)')


def page_colour(colour: str) -> str:
    """Return the CSS value of a figure's colour."""
    return _COLOURS[colour]


class SvgInliner:
    """Inlines the figures of one page, in page order.

    Each glyph is defined at its first use and referenced afterwards, which makes a report a third
    smaller. Unreferenced ids are removed, except those with a colon, which name parts of a model.
    """

    def __init__(self) -> None:
        self._glyphs: set[str] = set()

    def __call__(self, svg: str) -> str:
        """Return the SVG element of one figure for the page."""
        for colour, name in _COLOURS.items():
            svg = svg.replace(colour, name)
        svg = svg.replace(_BAND, "opacity: var(--band)")
        svg = _GLYPH.sub(self._once, svg)
        used = set(_REFERENCE.findall(svg)) | self._glyphs
        svg = _ID.sub(lambda match: match[0] if match[1] in used else "", svg)
        return re.sub(r">\s+<", "><", svg).replace("<svg ", '<svg class="plot" ', 1)

    def _once(self, match: re.Match[str]) -> str:
        if match[1] in self._glyphs:
            return ""
        self._glyphs.add(match[1])
        return match[0]
