"""The page in headless Chromium: it renders, tables sort, nothing is asked of a network, a phone can read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelforge.bundle.read import open_bundle
from modelforge.report import Report, collect, write_html
from tests.report.browser import Page
from tests.report.split_bundles import named_split
from tests.report.test_page import HOSTILE

pytestmark = pytest.mark.chromium

SUMMARY = "#summary table"


@pytest.fixture(scope="session")
def page_file(report: Report, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_html(report, file, bundle=bundle)
    return file


@pytest.fixture
def page(browser: Page, page_file: Path) -> Page:
    browser.faults.clear()
    browser.requests.clear()
    browser.open(page_file.as_uri())
    return browser


def column(page: Page, number: int) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('{SUMMARY} tbody tr')].map(r => r.cells[{number}].innerText)")


def test_it_renders_without_a_fault_or_a_request(page: Page, page_file: Path) -> None:
    assert page.evaluate("document.querySelectorAll('article.card').length") == 8
    heights = page.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => s.checkVisibility()).map(s => s.clientHeight)"
    )
    assert len(heights) > 60
    assert min(heights) > 5
    assert page.faults == []
    assert page.requests == [page_file.as_uri()]


def test_style_is_applied(page: Page) -> None:
    """The policy names it by digest: a wrong one would leave the page bare."""
    assert page.evaluate("getComputedStyle(document.querySelector('.badge.good')).borderRadius") != "0px"
    assert page.evaluate("getComputedStyle(document.querySelector('svg .line')).fill") == "none"


def test_tables_sort_on_click(page: Page) -> None:
    """By figures, not by letters; what has none stands last in both directions."""
    change = f"{SUMMARY} th:nth-child(7) button"
    heading = f"document.querySelector('{SUMMARY} th:nth-child(7)').getAttribute('aria-sort')"
    assert page.evaluate(heading) == "none"
    page.click(change)
    assert page.evaluate(heading) == "ascending"
    assert column(page, 6) == ["+0.0025", "±0", "−0.0020", "−0.0075", "–", "–"]
    page.click(change)
    assert page.evaluate(heading) == "descending"
    assert column(page, 6) == ["−0.0075", "−0.0020", "±0", "+0.0025", "–", "–"]
    page.click(f"{SUMMARY} th:nth-child(1) button")
    assert column(page, 0) == ["a100", "cortex-a76", "jetson-agx-orin", "rk3588", "t4", "x86-64"]
    assert page.evaluate(heading) == "none"
    assert page.faults == []


def test_tables_sort_by_keyboard(page: Page) -> None:
    page.press(f"{SUMMARY} th:nth-child(1) button")
    page.press(f"{SUMMARY} th:nth-child(1) button")
    assert column(page, 0) == ["x86-64", "t4", "rk3588", "jetson-agx-orin", "cortex-a76", "a100"]


def test_drawings_cannot_be_sorted_by(page: Page) -> None:
    bare = page.evaluate(
        "[...document.querySelectorAll('#deltas th[scope=col]')].filter(h => !h.querySelector('button'))"
        ".map(h => h.innerText)"
    )
    assert bare == ["0 to 0.0125; line: allowed", "0 to 12.54 ms; line: budget"]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(page: Page, page_file: Path, width: int) -> None:
    page.open(page_file.as_uri(), width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_both_colour_schemes(page: Page, page_file: Path, tmp_path: Path) -> None:
    colours, images = {}, {}
    for scheme in ("light", "dark"):
        page.open(page_file.as_uri(), scheme=scheme)
        colours[scheme] = page.evaluate(
            "['body', '.card', 'svg .lower'].map(s => { const c = getComputedStyle(document.querySelector(s));"
            " return [c.backgroundColor, c.color, c.fill]; })"
        )
        page.screenshot(tmp_path / f"{scheme}.png", full=False)
        images[scheme] = (tmp_path / f"{scheme}.png").read_bytes()
    assert all(light != dark for light, dark in zip(colours["light"], colours["dark"], strict=True))
    assert images["light"] != images["dark"]
    assert page.faults == []


def test_links_lead_to_the_cards(page: Page) -> None:
    broken = page.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    )
    assert broken == 0
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == page.evaluate(
        "document.querySelectorAll('[id]').length"
    )


@pytest.mark.parametrize("which", ["page_file", "split_file", "cut_file"])
def test_every_control_and_drawing_has_a_name(page: Page, which: str, request: pytest.FixtureRequest) -> None:
    page.open(request.getfixturevalue(which).as_uri())
    assert (
        page.evaluate(
            "[...document.querySelectorAll('button, summary, a')].filter(e => !e.textContent.trim()).length"
            " + [...document.querySelectorAll('svg:not(.bar)')].filter(e => !e.ariaLabel || e.role!='img').length"
            " + [...document.querySelectorAll('table')].filter(t => !t.caption.textContent).length"
        )
        == 0
    )


def test_folded_parts_open_for_printing(page: Page) -> None:
    closed = "document.querySelectorAll('details:not([open])').length"
    before = page.evaluate(closed)
    assert before > 5
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(closed) == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(closed) == before


def test_hostile_names_run_nothing(
    browser: Page, make_bundle: Callable[..., Path], tmp_path: Path, hostile_documents: dict[str, Any]
) -> None:
    path = make_bundle(hostile_documents, notes=[HOSTILE], commands=[[HOSTILE]])
    file = tmp_path / "hostile.html"
    write_html(collect(open_bundle(path)), file, bundle=path)
    browser.faults.clear()
    browser.requests.clear()
    browser.open(file.as_uri(), width=390)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert HOSTILE in browser.evaluate("document.querySelector('#v0').textContent")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.faults == []
    assert browser.requests == [file.as_uri()]


@pytest.fixture(scope="session")
def split_file(split_report: Report, split_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("split-page") / "split.html"
    write_html(split_report, file, bundle=split_path)
    return file


@pytest.fixture
def cut_file(make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """Cut elsewhere than over tiers, and with a part that is left out."""
    about = named_split("")
    del about["split"]["tiers"]
    path = make_bundle({}, about | {"targets": 3}, stage="head")
    write_html(collect(open_bundle(path)), tmp_path / "cut.html", bundle=path)
    return tmp_path / "cut.html"


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (1280, "light")])
def test_a_split_model_is_drawn(browser: Page, split_file: Path, width: int, scheme: str) -> None:
    """Boxes, bars and curves are there and seen, at every width, without a fault or a request."""
    browser.faults.clear()
    browser.requests.clear()
    browser.open(split_file.as_uri(), width=width, scheme=scheme)
    assert browser.evaluate("[...document.querySelectorAll('.stage h3')].map(h => h.innerText)") == [
        "head", "body", "tail",
    ]  # fmt: skip
    seen = "[...document.querySelectorAll('{}')].map(s => s.getBoundingClientRect().height > {})"
    assert browser.evaluate(seen.format("svg.sweep", 100)) == [True]
    assert browser.evaluate(seen.format("svg.sweep g rect", 0.3)) == [True] * 13
    assert browser.evaluate(seen.format("article svg.curve", 80)) == [True] * 4
    fills = browser.evaluate(
        "[...new Set([...document.querySelectorAll('svg.sweep g rect')].map(r => getComputedStyle(r).fill))]"
    )
    assert len(fills) == 3, "device, edge and links are told apart"
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.faults == []
    assert browser.requests == [split_file.as_uri()]


def test_boxes_stand_in_a_row_and_on_a_phone_below_each_other(browser: Page, split_file: Path) -> None:
    places = "[...document.querySelectorAll('.stage')].map(s => s.getBoundingClientRect()).map(r => [r.x, r.y])"
    browser.open(split_file.as_uri(), width=1280)
    wide = browser.evaluate(places)
    assert wide[0][0] < wide[1][0] < wide[2][0]
    browser.open(split_file.as_uri(), width=390)
    narrow = browser.evaluate(places)
    assert len({x for x, _ in narrow}) == 1
    assert narrow[0][1] < narrow[1][1] < narrow[2][1]


def test_the_ways_are_sorted_and_sort(browser: Page, split_file: Path) -> None:
    browser.open(split_file.as_uri())
    browser.evaluate(
        "[...document.querySelectorAll('#stages table')]"
        ".find(t => t.caption.innerText.startsWith('The fastest ways')).id = 'ways'"
    )
    totals = "[...document.querySelector('#ways').tBodies[0].rows].map(r => Number(r.cells[1].dataset.key))"
    before = browser.evaluate(totals)
    assert before == sorted(before)
    assert len(before) == 5
    browser.click("#ways th:nth-child(2) button")
    browser.click("#ways th:nth-child(2) button")
    assert browser.evaluate(totals) == sorted(before, reverse=True)


def test_hostile_stages_run_nothing(
    browser: Page, make_bundle: Callable[..., Path], tmp_path: Path, hostile_split: dict[str, Any]
) -> None:
    path = make_bundle({}, hostile_split, stage=HOSTILE[:120])
    file = tmp_path / "hostile.html"
    write_html(collect(open_bundle(path)), file, bundle=path)
    browser.faults.clear()
    browser.requests.clear()
    browser.open(file.as_uri(), width=390)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert HOSTILE in browser.evaluate("document.querySelector('#stages').textContent")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.faults == []
    assert browser.requests == [file.as_uri()]


def test_the_policy_stops_what_would_get_in(browser: Page, page_file: Path, tmp_path: Path) -> None:
    """Were escaping ever to fail: the same page with a script, a handler, a style and an image put into it."""
    injected = (
        "<script>window.ran=1</script><img src=https://localhost/x.png onerror='window.ran=1'><p style='color:red'>"
    )
    file = tmp_path / "injected.html"
    file.write_text(page_file.read_text(encoding="utf-8").replace("<footer>", injected + "<footer>"), encoding="utf-8")
    browser.faults.clear()
    browser.open(file.as_uri())
    assert browser.evaluate("window.ran") is None
    # A request that the policy blocks is announced, and not made; what matters is that each was blocked.
    assert len([fault for fault in browser.faults if "Content Security Policy" in fault]) >= 3
    assert browser.evaluate("performance.getEntriesByType('resource').filter(e => e.transferSize).length") == 0
