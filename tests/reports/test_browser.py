"""The page in a real browser: what it draws, asks for and complains about, on two screens."""

from __future__ import annotations

import itertools

import pytest

from pocketvlm.reports import html
from pocketvlm.reports.report_file import parse_report
from tests.reports.browser import launch_browser
from tests.reports.documents import HOSTILE, poison, run_report, several

SCREENS = [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

EMPTY_CHARTS = """
[...document.querySelectorAll("svg[role=img]")].filter(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = svg.querySelectorAll("rect:not(.track), circle, path, line:not(.g)").length;
  return !svg.closest("details:not([open])") && (box.width < 100 || box.height < 10) || !drawn;
}).map(svg => svg.querySelector("title")?.textContent ?? "without a title")
"""

UNNAMED = """
[...document.querySelectorAll("svg[role=img]")]
  .filter(svg => !svg.querySelector(":scope > title") || !svg.querySelector(":scope > desc"))
  .length
+ [...document.querySelectorAll("table")]
  .filter(table => !table.caption || [...table.querySelectorAll("th")].some(th => !th.scope))
  .length
"""

# Contrast of text with its background, as WCAG 2 defines it; large text may have less.
FAINT = r"""
(() => {
  const parse = text => text.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour[3] === undefined || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.closest("title, desc, style")) continue;
    const style = getComputedStyle(node);
    const ink = node instanceof SVGElement ? style.fill : style.color;
    const [more, less] = [light(parse(ink)), light(ground(node))].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const least = size >= 24 || bold && size >= 18.66 ? 3 : 4.5;
    const ratio = (more + 0.05) / (less + 0.05);
    const name = node.className?.baseVal ?? node.className;
    if (ratio < least) faint.add(`${name} ${ratio.toFixed(2)}`);
  }
  return [...faint];
})()
"""


@pytest.fixture(scope="module")
def browser():
    with launch_browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    documents = {
        "one": (run_report(),),
        "several": several(run_report()),
        "hostile": several(poison(run_report(), HOSTILE + "x" * 400)),
    }
    for name, reports in documents.items():
        page = html.render_html(*map(parse_report, reports))
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["one", "several", "hostile"])
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_page_draws_everything_and_needs_nothing(browser, pages, name, width, scheme):
    file = pages / f"{name}.html"
    tab = browser.open(file, width=width, scheme=scheme)
    assert tab.requests == [file.as_uri()]
    assert tab.complaints == []
    assert tab.evaluate(OVERFLOW) <= 0
    assert tab.evaluate(EMPTY_CHARTS) == []
    assert tab.evaluate(UNNAMED) == 0
    assert tab.evaluate(FAINT) == []
    tab.close()


def test_every_plot_is_there(browser, pages):
    tab = browser.open(pages / "several.html", width=1280)
    titles = tab.evaluate(
        "[...document.querySelectorAll('svg[role=img] > title')].map(one => one.textContent)"
    )
    for plot in (
        "Quality against size",
        "Quality against time to first token, a processor",
        "Quality against time per token, pixel-8",
        "Time to first token, as the user waits, int4",
        "Decode rate over the run, process by process",
        "Decode rate of continuous answers",
        "Temperature of the hottest sensor",
    ):
        assert plot in titles, plot
    count = "document.querySelectorAll('figure.plane .front').length"
    assert tab.evaluate(count) > 0
    tab.close()


def test_the_page_is_operated_by_keyboard(browser, pages):
    tab = browser.open(pages / "several.html", width=1280)
    tab.press("Tab")
    focused = "document.activeElement.textContent.trim()"
    assert tab.evaluate(focused) == "Skip to content"
    seen = set()
    for _ in range(12):
        tab.press("Tab")
        seen.add(tab.evaluate("document.activeElement.tagName"))
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
    assert {"A", "SUMMARY", "DIV"} <= seen  # links, what unfolds, and tables that scroll
    tab.close()


def test_a_screen_reader_finds_landmarks_headings_and_tables(browser, pages):
    tab = browser.open(pages / "several.html", width=1280)
    tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in tree if not node.get("ignored")]
    for role in ("main", "navigation", "banner", "heading", "table", "rowheader", "columnheader"):
        assert role in roles, role
    images = [node for node in tree if node["role"]["value"] in ("image", "img")]
    assert images
    assert all(node["name"]["value"] for node in images if not node.get("ignored"))
    levels = tab.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].map(one => Number(one.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    tab.close()
