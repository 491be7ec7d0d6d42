"""The report in a real browser: it loads, fits, sorts, toggles, and runs no script of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.chromium import Page, chromium_page, find_chromium
from tests.support.reports import Reports

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")

WIDTHS = (1280, 390)
NAMES = ("one", "several", "hostile", "unpredicted", "repeats")
TOO_WIDE = (  # tables and cells
    "[...document.querySelectorAll('.scroll, .scroll td')].filter(e =>"
    "  e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 120))"
)
SMALLEST_TYPE = 10.5  # font size in a figure on a phone, in CSS pixels


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium_page() as page:
        yield page


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_loads_without_errors_and_fits(
    browser: Page, reports: Reports, name: str, width: int
) -> None:
    browser.open(reports.pages[name], width)
    assert browser.errors == []
    assert browser.requests == [reports.pages[name].resolve().as_uri()]
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # only elements in a box that scrolls may be wider than the window
    cut = browser.evaluate(
        "[...document.querySelectorAll('body *:not(svg *)')].filter(e => {"
        "  const b = e.getBoundingClientRect();"
        "  return b.width && !e.closest('.scroll') && !e.matches('legend')"
        "    && (b.right > innerWidth + 1 || b.left < -1); }).map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []
    flat = browser.evaluate(
        "[...document.querySelectorAll('svg.plot')].filter(e => e.clientHeight < 50).length"
    )
    assert flat == 0


@pytest.mark.parametrize("name", ["one", "several", "repeats"])
@pytest.mark.parametrize("width", [1280, 1000, 840, 768])
def test_tables_need_no_scrolling(browser: Page, reports: Reports, name: str, width: int) -> None:
    browser.open(reports.pages[name], width)
    assert browser.evaluate(TOO_WIDE) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_table_on_a_phone_has_blocks_with_labels(
    browser: Page, reports: Reports, name: str
) -> None:
    browser.open(reports.pages[name], 390)
    assert browser.evaluate(TOO_WIDE) == []
    labels = browser.evaluate(
        "[...document.querySelectorAll('td:nth-child(2)')].map(e => ["
        "  getComputedStyle(e, '::before').content, e.closest('table').rows[0].cells[1].innerText])"
    )
    assert labels
    assert all(head.strip() and head.strip() in shown for shown, head in labels)


@pytest.mark.parametrize("name", NAMES)
def test_text_in_figures_is_readable_on_a_phone(browser: Page, reports: Reports, name: str) -> None:
    browser.open(reports.pages[name], 390)
    sizes = browser.evaluate(  # 100 units of a glyph are its font size
        "[...document.querySelectorAll('svg.plot g[transform*=scale] use')].map(e => {"
        "  const m = e.getScreenCTM();"
        "  return [100 * Math.hypot(m.c, m.d), e.closest('figure').id]; })"
    )
    assert len(sizes) > 100
    assert min(sizes) >= [SMALLEST_TYPE]
    cut = browser.evaluate(
        "[...document.querySelectorAll('svg.plot g[transform*=scale] use')].filter(e => {"
        "  const [inner, outer] = [e, e.closest('svg')].map(e => e.getBoundingClientRect());"
        "  return inner.left < outer.left - 1 || inner.right > outer.right + 1"
        "    || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;"
        "}).map(e => e.closest('figure').id)"
    )
    assert cut == []


def test_a_table_is_sorted_on_a_phone(browser: Page, reports: Reports) -> None:
    browser.open(reports.pages["one"], 390)
    browser.click("[aria-label=workers] th:nth-child(2) button")
    counts = browser.evaluate(
        "[...document.querySelectorAll('[aria-label=workers] tbody tr')]"
        ".sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)"
        ".map(r => Number(r.cells[1].dataset.value))"
    )
    assert counts == sorted(counts)
    assert len(set(counts)) > 1


def test_text_of_a_run_is_not_executed(browser: Page, reports: Reports) -> None:
    browser.open(reports.pages["hostile"], 1280)
    assert browser.evaluate("window.hacked === undefined")
    assert "<script>window.hacked" in browser.evaluate("document.body.innerText")


def test_checkbox_hides_a_model_in_every_figure_of_its_run(browser: Page, reports: Reports) -> None:
    browser.open(reports.pages["several"], 1280)
    shown = (
        "(n => [...document.querySelectorAll(`#run${n}-run [id*=':sme_asgd:']`)]"
        ".map(e => getComputedStyle(e).display !== 'none'))"
    )
    # band and line of the loss, band and line of its fall, and the line of the error
    assert browser.evaluate(f"{shown}(1)") == 5 * [True]
    browser.click("#run1-run input[value=sme_asgd]")
    assert browser.evaluate(f"{shown}(1)") == 5 * [False]
    assert browser.evaluate(f"{shown}(2)") == 3 * [True]  # no figure of the fall
    browser.click("#run1-run input[value=sme_asgd]")
    assert browser.evaluate(f"{shown}(1)") == 5 * [True]


def test_click_on_a_heading_sorts_the_table(browser: Page, reports: Reports) -> None:
    browser.open(reports.pages["one"], 1280)
    column = (
        "[...document.querySelectorAll('[aria-label=workers] tbody tr')]"
        ".map(r => Number(r.cells[1].dataset.value))"
    )
    counts = browser.evaluate(column)
    head = "[aria-label=workers] th:nth-child(2)"
    browser.click(f"{head} button")
    assert browser.evaluate(column) == sorted(counts)
    assert browser.evaluate(f"document.querySelector('{head}').ariaSort") == "ascending"
    browser.click(f"{head} button")
    assert browser.evaluate(column) == sorted(counts, reverse=True)


def test_pointer_shows_values(browser: Page, reports: Reports) -> None:
    browser.open(reports.pages["one"], 1280)
    x, y = browser.evaluate(
        "(() => { const e = document.querySelector('#loss svg'); e.scrollIntoView();"
        "const b = e.getBoundingClientRect();"
        "return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )
    browser.move(x, y)
    shown = browser.evaluate("document.querySelector('#loss .values').innerText")
    assert shown.startswith("update ")
    assert "observed: " in shown
    assert "SME-ASGD" in shown
    browser.move(1, 1)
    assert browser.evaluate("document.querySelector('#loss .values')") is None


def test_print_cuts_nothing_off(browser: Page, reports: Reports, tmp_path: Path) -> None:
    browser.open(reports.pages["several"], 700)
    browser.call("Emulation.setEmulatedMedia", media="print")
    wide = browser.evaluate(
        "[...document.querySelectorAll('table, figure, pre')].filter(e =>"
        "  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    browser.call("Emulation.setEmulatedMedia", media="")
    assert wide == []
    browser.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_a_dark_page_changes_the_colour_of_text(browser: Page, reports: Reports) -> None:
    ink = "getComputedStyle(document.querySelector('#loss svg text, #loss svg')).color"
    browser.open(reports.pages["one"], 1280)
    light = browser.evaluate(ink)
    browser.open(reports.pages["one"], 1280, dark=True)
    assert browser.evaluate(ink) != light
    assert "#1b1b1f" not in reports.text("one").split("</style>", 1)[1]
