"""The site is built strictly and without torch; links, anchors, images, settings, figures and messages on it hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from align.config import build_config
from align.recipes import recipe_names
from align.records import Question, parse_line
from scripts.site_pages import public_modules
from tests.doc_pages import PAGES, ROOT, blocks_of, name_of

LANGUAGES = {"sh", "yaml", "json", "python", "diff", "text"}
BUILD = (
    "import sys; from mkdocs.__main__ import cli;"
    "cli(['build', '--strict', '--site-dir', sys.argv[1]], standalone_mode=False);"
    "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
)
MAY_STAND_FIRST = {"policy": "path/to/checkpoint", "questions": "questions.jsonl"}


class Page(HTMLParser):
    """The links, sources and anchors of an HTML file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.anchors.add(str(found["id"]))
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if found.get("src"):
            self.sources.append(str(found["src"]))
        if tag == "link" and found.get("href") and found.get("rel") != "canonical":
            self.sources.append(str(found["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """Every page of the built site by its path."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
    return {path: Page(path) for path in sorted(folder.rglob("*.html")) if path.name != "404.html"}


def test_every_link_and_anchor_of_the_site_leads_somewhere(site):
    broken = []
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in site and anchor not in site[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert len(site) > 20
    assert broken == []


def test_a_page_fetches_nothing_and_every_image_is_there(site):
    for path, page in site.items():
        for source in page.sources:
            assert not urlsplit(source).netloc, f"{path.name} fetches {source}"
            assert source.startswith("data:") or (path.parent / unquote(urlsplit(source).path)).is_file(), source


def test_the_reference_has_every_public_module(site):
    anchors = set().union(*(page.anchors for page in site.values()))
    assert set(public_modules()) - anchors == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere_where_the_page_is_read_in_the_repository(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        assert parts.scheme or not parts.path or (page.parent / parts.path).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fenced_block_names_its_language(page):
    fenced = re.findall(r"^```(\w*).*\n(?:.*\n)*?```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(fenced) <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_on_a_page_are_settings(page, tmp_path):
    for block in blocks_of(page):
        if block.language == "yaml":
            build_config(MAY_STAND_FIRST | yaml.safe_load(block.text), base=tmp_path, where=f"{page.name}:{block.line}")


@pytest.mark.parametrize("name", ["README.md", "docs/data.md"])
def test_questions_on_a_page_are_questions(name):
    [block] = [block for block in blocks_of(ROOT / name) if block.language == "json" and block.title is None]
    assert parse_line(block.text.strip(), Question, name).answer


def test_the_table_of_a_question_has_all_of_its_keys():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text[: text.index("A pair is")], flags=re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(Question.model_fields)


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    readme, benchmarks = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/benchmarks.md"))
    table = readme[readme.index("| stage,") : readme.index("Measured on")]
    figures = re.findall(r"(\d+\.\d+)x", table)
    for figure in figures:
        assert re.search(rf"\*\*{re.escape(figure)}x?\*\*", benchmarks), (
            f"{figure} is not among the benchmarks' bold ones"
        )
    memory = re.findall(r"([\d.]+) MiB, not ([\d.]+)", table)
    for ours, theirs in memory:
        assert re.search(rf"\| (\*\*)?{re.escape(ours)}(\*\*)? \| {re.escape(theirs)} \|", benchmarks)
    assert (len(figures), len(memory)) == (4, 2)


def test_version_and_licence_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"\n## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_that_are_installed_are_there(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"(?:'\.|valley-align)\[([\w,-]+)\]'", page.read_text(encoding="utf-8"))
    assert {extra for group in named for extra in group.split(",")} <= set(project["optional-dependencies"])


def test_every_recipe_has_its_line():
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`([\w.-]+)`\]", text, flags=re.MULTILINE) == sorted(
        recipe_names(), key=lambda name: text.index(f"[`{name}`]")
    )


def test_a_message_that_troubleshooting_quotes_is_one_that_the_code_gives():
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "align").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"|\{[^{}\n]*\}', "", source)
    quoted = re.findall(r"\*\*`([^`]+)`", text)
    missing = []
    for message in quoted:
        # Names, numbers and what is left out vary.
        parts = [part.strip() for part in re.split(r"\.\.\.|\bN\b|\b[MN]\b|\d+", message)]
        missing += [message] if any(part not in source for part in parts if len(part) > 3) else []
    assert len(quoted) > 10
    assert missing == []
