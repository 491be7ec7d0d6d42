"""Screenshots of reports, desktop (1280 pixels) and phone (390), light and dark.

.venv/bin/python scripts/screenshots.py REPORT.html ... --out DIRECTORY
"""

from __future__ import annotations

import argparse
from pathlib import Path

from chromium import chromium_page

VIEWS = {"desktop": (1280, False), "desktop-dark": (1280, True), "phone": (390, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with chromium_page() as page:
        for report in options.reports:
            for view, (width, dark) in VIEWS.items():
                page.open(report, width, dark=dark)
                path = options.out / f"{report.stem}-{view}.png"
                page.screenshot(path)
                print(path)


if __name__ == "__main__":
    main()
