"""The report as a page, read by a parser and by a browser."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ssmc.errors import UsageError
from ssmc.inspection.page import render, write
from ssmc.inspection.plots import save
from ssmc.inspection.story import Story

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
SIZES = {"phone": (390, 844), "desktop": (1440, 900)}
SMALLEST = 11  # pixels of text

# Of every text that is shown: its size, and whether it is cut off or lies over another.
MEASURE = """() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || !parent.checkVisibility()) continue;
    const range = document.createRange(); range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    const scrolls = parent.closest('.scroll, pre') !== null;
    found.push({text: node.textContent.trim().slice(0, 40), left: box.left, right: box.right,
      size: parseFloat(getComputedStyle(parent).fontSize), scrolls});
  }
  return {texts: found, width: document.documentElement.scrollWidth};
}"""
ROWS = """() => [...document.querySelectorAll('.graph')].filter(g => g.checkVisibility()).map(g =>
  [...g.querySelectorAll('li')].map(li => {
    const row = li.getBoundingClientRect();
    const call = li.querySelector('.call').getBoundingClientRect();
    const rails = li.querySelector('svg').getBoundingClientRect();
    return {top: row.top, bottom: row.bottom, callBottom: call.bottom, callLeft: call.left,
      railsRight: rails.right, railsHeight: rails.height};
  }))"""


class Reader(HTMLParser):
    """What a page refers to, and whether its tags are closed in order."""

    VOID = ("meta", "img", "line", "circle", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [str(given[k]) for k in ("href", "src") if k in given]
        self.alts += [str(given.get("alt"))] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    write(story, story.worst_layer(), out)
    return out


def test_the_page_needs_nothing_else(page: Path) -> None:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.open == []
    assert "script" not in reader.tags
    assert all(link.startswith(("#", "data:image/svg+xml")) for link in reader.links)
    assert len(reader.alts) >= 9
    assert all(len(alt) > 20 for alt in reader.alts)


def test_the_page_tells_of_every_pass_and_tensor(page: Path, story: Story) -> None:
    text = page.read_text(encoding="utf-8")
    for record in story.records:
        assert f"<h3>{record['name']}</h3>" in text
    for name in story.moment.tensors:
        assert name in text
    matched = f"<summary>matched in layer {story.worst_layer()}: 1 of 8</summary>"
    assert text.count(matched) >= 2  # of hadamard and ssm-sites, one a layer
    reason = next(r for r in story.records if r["skipped"])["skipped"][0]["reason"]
    assert reason in text
    recipe = text.partition("<pre")[2].partition(">")[2].partition("</pre>")[0]
    assert json.loads(recipe.replace("&#34;", '"')) == json.loads(json.dumps(story.about["recipe"]))


def test_names_are_no_markup(bare_story: Story) -> None:
    named = Story("<b>&", bare_story.about, bare_story.report, bare_story.moment)
    text = render(named, 0)
    assert "<h1>&lt;b&gt;&amp;</h1>" in text
    assert "is not here" in text
    for record in bare_story.records:
        assert f"<h3>{record['name']}</h3>" in text
    assert "matched in layer 0" in text
    assert "before and after" not in text


def test_plots_are_files(story: Story, tmp_path: Path) -> None:
    written = save(story, 2, tmp_path / "plots")
    names = {path.name for path in written}
    assert "ranges-layer-2-out_proj-input.png" in names
    assert {"errors.png", "sizes.png", "outliers-u.png"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_place_that_cannot_be_written(bare_story: Story, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        write(bare_story, 0, tmp_path / "missing" / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        save(bare_story, 0, tmp_path / "file")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_browser_shows_it_legibly(browser: Any, page: Path, size: str) -> None:
    width, height = SIZES[size]
    tab = browser.new_page(viewport={"width": width, "height": height})
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: problems.append(r.url) if r.url.startswith("http") else None)
    tab.goto(page.as_uri())
    for summary in tab.query_selector_all("summary"):
        if summary.evaluate("s => !s.parentElement.open"):
            summary.click()
    assert problems == []
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    found = tab.evaluate(MEASURE)
    assert found["width"] <= width
    assert len(found["texts"]) > 500
    assert [t for t in found["texts"] if t["size"] < SMALLEST] == []
    inside = [t for t in found["texts"] if not t["scrolls"]]
    assert [t for t in inside if t["left"] < 0 or t["right"] > width + 0.5] == []
    _check_rows(tab.evaluate(ROWS))
    if os.environ.get("SSMC_WRITE"):
        _take_pictures(tab, size)
    tab.close()


def _check_rows(graphs: list[list[dict[str, float]]]) -> None:
    """Rows follow one another without a gap, each as high as its label and its rails."""
    assert len(graphs) >= 7
    for rows in graphs:
        for row, following in itertools.pairwise(rows):
            assert abs(row["bottom"] - following["top"]) < 0.5
        for row in rows:
            assert row["callBottom"] <= row["bottom"] + 0.5
            assert row["railsRight"] <= row["callLeft"] + 0.5
            assert abs(row["railsHeight"] - (row["bottom"] - row["top"])) < 0.5


def _take_pictures(tab: Any, size: str) -> None:
    from PIL import Image

    IMAGES.mkdir(exist_ok=True)
    for section in ("passes", "ranges"):
        target = "h3:text-is('hadamard')" if section == "passes" else "#ranges"
        tab.evaluate("window.scrollTo(0, 0)")
        tab.locator(target).evaluate("e => e.scrollIntoView()")
        shot = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
        shot = shot.quantize(256, Image.Quantize.MAXCOVERAGE)  # rare colours are the marks
        shot.save(IMAGES / f"report-{section}-{size}.png", optimize=True)
