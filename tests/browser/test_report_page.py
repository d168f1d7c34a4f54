"""The page in a real browser: nothing on the console, no sideways scrolling, filters, and the keyboard alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.report import write_report
from tests.browser.chromium import Page, find_chromium
from tests.report.fake_run import FakeRun

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    long = "a_word_without_any_place_to_break_it_" * 12
    run = FakeRun(root / "critic", num_held_out=40, num_training=12).build()
    path = run / "round-1/samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("I count", long), encoding="utf-8")
    control = FakeRun(root / "control", skill=(0.45, 0.5), num_held_out=40, num_training=12, random_critic=True).build()
    return write_report(run, control=control)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    assert CHROMIUM is not None
    with Page(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


SHOWN = "[...document.querySelectorAll('.q')].filter(q => !q.hidden).map(q => q.dataset.kind)"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_and_the_console_is_silent(page, report, width, dark):
    page.open(report, width=width, dark=dark)
    page.run("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    assert page.problems == []


def test_dark_and_light_differ(page, report):
    colours = []
    for dark in (False, True):
        page.open(report, width=1440, dark=dark)
        colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]


def test_filters_show_what_they_name(page, report):
    page.open(report, width=1440)
    everything = page.run(SHOWN)
    assert {"gained", "training"} <= set(everything)
    page.run("document.querySelector('[name=kind][value=gained]').click()")
    assert page.run(SHOWN) == [kind for kind in everything if kind == "gained"]
    page.run("document.querySelector('[name=kind][value=\"\"]').click()")
    assert page.run(SHOWN) == everything


def test_search_finds_the_words_of_a_response(page, report):
    page.open(report, width=1440)
    first = page.run("document.querySelector('.q .said').textContent")
    page.run("document.getElementById('search').focus()")
    page.call("Input.insertText", text=first.upper())
    found = page.run(
        "[...document.querySelectorAll('.q')].filter(q => !q.hidden).map(q => q.textContent.toLowerCase())"
    )
    assert found
    assert all(word in text for text in found for word in first.lower().split())
    page.call("Input.insertText", text=" nothing says this")
    assert page.run(SHOWN) == []
    assert page.run("!document.getElementById('nothing').hidden")


def test_questions_open_by_keyboard_alone(page, report):
    page.open(report, width=1440)
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.press("Tab")
    assert page.run("document.activeElement.id") == "unfold"
    page.press("Tab")
    assert page.run("document.activeElement.closest('.q') === document.querySelector('.q')")
    assert not page.run("document.querySelector('.q').open")
    page.press("Enter")
    assert page.run("document.querySelector('.q').open")


def test_the_reference_curve_appears_on_request(page, report):
    page.open(report, width=1440)
    visible = "[...document.querySelectorAll('.line.reference-curve')].filter(line => line.getBoundingClientRect().width > 0).length"
    assert page.run(visible) == 0
    page.run("document.getElementById('reference-curve').click()")
    assert page.run(visible) > 0


def test_texts_stand_out_from_their_background(page, report):
    """WCAG AA, contrast of at least 4.5 for every visible text; texts on a wash of their own colour included."""
    for dark in (False, True):
        page.open(report, width=1440, dark=dark)
        page.run("document.querySelectorAll('details').forEach(details => { details.open = true })")
        weak = page.run(WEAK_CONTRAST)
        assert weak == []


WEAK_CONTRAST = """(() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const weak = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest('svg, script, style, .sep')) continue;
    if (element.getBoundingClientRect().width === 0) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) weak.add(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return [...weak];
})()"""


def test_filters_follow_the_arrow_keys(page, report):
    page.open(report, width=1440)
    page.run("document.querySelector('[name=kind]').focus()")
    page.press("ArrowRight")
    chosen = page.run("document.querySelector('[name=kind]:checked').value")
    assert chosen
    assert set(page.run(SHOWN)) == {chosen}


@pytest.mark.parametrize("width", [390, 1440])
def test_whatever_scrolls_can_be_scrolled_by_keyboard(page, report, width):
    page.open(report, width=width)
    page.run("document.querySelectorAll('details').forEach(details => { details.open = true })")
    page.run(SEE_ALL)
    assert page.run(UNREACHABLE) == []


def test_every_section_is_named_in_the_navigation_and_the_first_tab_skips_it(page, report):
    page.open(report, width=1440)
    assert page.run(
        "[...document.querySelectorAll('main > [id]')].map(e => '#' + e.id).join()"
        " === [...document.querySelectorAll('nav a')].map(a => a.hash).join()"
    )
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    page.press("Enter")
    assert page.run("location.hash") == "#rounds"


def test_texts_of_neighbours_do_not_run_together(page, report):
    """At 390 px no two pieces of a question's line overlap."""
    page.open(report, width=390)
    assert page.run(OVERLAPS) == []


SEE_ALL = """(async () => {
  for (const q of document.querySelectorAll('.q')) {
    q.scrollIntoView({behavior: 'instant'});
    await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
  }
})()"""

HOSTILE = [
    "<script>window.hit = 1</script>",
    "</p></details><img src=x onerror='window.hit = 1'>",
    '"><svg onload="window.hit = 1">',
    "</script><script>window.hit = 1</script><style>body { display: none }</style>",
    "<a href='javascript:window.hit = 1'>a link</a><iframe src=https://example.com></iframe>",
]


def test_what_a_model_says_is_never_run_nor_fetched(page, tmp_path):
    run = FakeRun(tmp_path / "hostile", skill=(0.5, 0.5), num_held_out=20, num_training=6, texts=HOSTILE).build()
    page.open(write_report(run), width=1440)
    page.run("document.querySelectorAll('details').forEach(details => { details.open = true })")
    said = page.run("[...document.querySelectorAll('.said')].map(said => said.textContent)")
    assert set(HOSTILE) <= set(said)
    assert page.run("window.hit === undefined && document.body.getBoundingClientRect().height > 0")
    assert page.run("document.querySelectorAll('.said *:not(em), iframe, main a:not([href^=\"#\"])').length") == 0
    assert page.problems == []


def test_a_thousand_questions_open_and_filter_without_waiting(page, tmp_path):
    """On a busy machine the slowest answer took 0.05 s; 2.1 s where every question was laid out at once."""
    run = FakeRun(tmp_path / "many", skill=(0.5, 0.6), num_held_out=700, num_training=300, num_responses=4).build()
    page.open(write_report(run, max_held_out=700, max_training=300), width=1440)
    assert page.run("document.querySelectorAll('.q').length") == 1000
    assert page.run(SLOWEST_ANSWER_MS) < 700


SLOWEST_ANSWER_MS = """(() => {
  const search = document.getElementById('search');
  const type = (text) => { search.value = text; search.dispatchEvent(new Event('input', {bubbles: true})); };
  const acts = [
    () => document.querySelector('[name=kind][value=gained]').click(),
    () => document.querySelector('[name=kind][value=""]').click(),
    () => type('red circles'),
    () => type(''),
    () => document.getElementById('unfold').click(),
  ];
  return Math.max(...acts.map(act => {
    const start = performance.now();
    act();
    document.body.offsetHeight;
    return performance.now() - start;
  }));
})()"""

UNREACHABLE = """(() => [...document.querySelectorAll('main *')].filter(e => {
  const style = getComputedStyle(e);
  const scrolls = (style.overflowX === 'auto' && e.scrollWidth > e.clientWidth + 1)
    || (style.overflowY === 'auto' && e.scrollHeight > e.clientHeight + 1);
  return scrolls && e.tabIndex < 0 && !e.querySelector('a, button, input, summary, [tabindex]');
}).map(e => `${e.tagName}.${e.className}`))()"""

OVERLAPS = """(() => [...document.querySelectorAll('.q > summary')].flatMap(summary => {
  const boxes = [...summary.children].map(e => e.getBoundingClientRect()).filter(box => box.width > 0);
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1
  ).map(() => summary.textContent.trim().slice(0, 60)));
}))()"""
