"""Screenshots of reports: desktop (1280 pixels) and phone (390), light and dark, and print.

The one in scripts/screenshots:

for p in 2 4 8 16; do
  .venv/bin/asgd run scripts/configs/workers.toml --set cluster.workers=$p --out runs/p$p
done
.venv/bin/asgd report runs/p2 runs/p4 runs/p8 runs/p16 -o workers.html
.venv/bin/python scripts/screenshots.py workers.html --out scripts/screenshots --views desktop \\
    --height 1250
"""

from __future__ import annotations

import argparse
from pathlib import Path

from chromium import chromium_page
from PIL import Image

VIEWS = {
    "desktop": (1280, False),
    "desktop-dark": (1280, True),
    "phone": (390, False),
    "phone-dark": (390, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--views", nargs="+", choices=[*VIEWS, "print"], default=[*VIEWS, "print"])
    parser.add_argument("--height", type=int, help="Height of the picture, in pixels of the page.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with chromium_page() as page:
        for report in options.reports:
            for view in options.views:
                path = options.out / f"{report.stem}-{view}.png"
                if view == "print":
                    path = path.with_suffix(".pdf")
                    page.open(report, 1280)
                    page.print(path)
                else:
                    width, dark = VIEWS[view]
                    page.open(report, width, dark=dark)
                    page.screenshot(path, options.height)
                    if options.height:
                        _shrink(path)
                print(path)


def _shrink(path: Path) -> None:
    """Reduce a picture to 256 colours; k-means keeps those of pale bands."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(kmeans=3)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main()
