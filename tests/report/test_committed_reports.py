"""The reports and pictures under docs: self-contained, small, and saying what docs/reports/README.md says of them."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {path.stem: path for path in sorted((DOCS / "reports").glob("*.html"))}
ABOUT = (DOCS / "reports/README.md").read_text(encoding="utf-8")


def text_of(page: Path) -> str:
    source = page.read_text(encoding="utf-8")
    source = re.sub(r"<(script|style)>.*?</\1>", " ", source, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", source))).replace(" .", ".")


def table_rows() -> dict[str, list[str]]:
    """Cells of the table of figures by the report that they belong to."""
    lines = [line for line in ABOUT.splitlines() if re.match(r"\| \[\w+\]\(\w+\.html\)", line)]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.sub(r"\[(\w+)\].*", r"\1", first): rest for first, *rest in found}


def test_there_is_a_report_of_each_run():
    assert set(PAGES) == {"critic", "random", "length"} == set(table_rows())


@pytest.mark.parametrize("name", PAGES)
def test_a_committed_report_is_small_and_needs_nothing_from_outside(name):
    source = PAGES[name].read_text(encoding="utf-8")
    assert len(source) < 1_500_000
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", source)
    assert not re.findall(r"/(?:home|root|tmp|work)/", re.sub(r"data:image/[^\"]*", "", source))


@pytest.mark.parametrize("name", PAGES)
def test_the_page_about_them_quotes_their_first_sentences_and_figures(name):
    said = text_of(PAGES[name])
    title = re.search(r"<h1>(.*?)</h1>", PAGES[name].read_text(encoding="utf-8"))
    assert title is not None
    assert html.unescape(title.group(1)).replace("\u00a0", " ") in ABOUT
    assert [cell for cell in table_rows()[name] if cell not in said] == []


def test_the_bad_runs_are_not_praised():
    titles = {
        name: re.search(r"<h1>(.*?)</h1>", path.read_text(encoding="utf-8")).group(1) for name, path in PAGES.items()
    }
    assert titles["critic"].startswith("Better")
    assert not titles["random"].startswith("Better")
    assert titles["length"].endswith("what it learned is length.")


def test_pictures_are_there_and_small():
    shown = re.findall(r"\]\(\.\./images/(report-[\w-]+\.png)\)", ABOUT)
    assert len(shown) >= 3
    for name in PAGES:
        for view in ("light", "dark", "phone"):
            path = DOCS / "images" / f"report-{name}-{view}.png"
            assert path.stat().st_size < 150_000
