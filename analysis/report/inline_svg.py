"""Figures inside a page: its colours, no repeated glyphs, no repeated ids."""

from __future__ import annotations

import re

from analysis.figures.canvas import BAND

# What the page calls a colour, so that it can be another one on a dark ground.
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
_BAND = f"opacity: {BAND}"  # a dark ground wants more of the colour
# Matplotlib defines each glyph once in a file, not once in a page of a dozen figures.
_GLYPH = re.compile(r'<path id="([^"]*)"(?: d="[^"]*")? transform="scale\(0\.015625\)"/>')
_ID = re.compile(r' id="([^":]*)"')
_REFERENCE = re.compile(r'(?:href="#|url\(#)([^")]*)')


def page_colour(colour: str) -> str:
    """Return what the page calls a colour of a figure."""
    return _COLOURS[colour]


class SvgInliner:
    """Fits the figures of one page into it, in the order of the page.

    A glyph is defined where it is first used and referred to from then on, which makes a report a
    third smaller. Ids that nothing refers to go; those with a colon name the parts of a model.
    """

    def __init__(self) -> None:
        self._glyphs: set[str] = set()

    def __call__(self, svg: str) -> str:
        """Return the SVG element of one figure as it goes into the page."""
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
