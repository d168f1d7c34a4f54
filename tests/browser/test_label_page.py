"""The labelling page as it is served, in a real browser: shown, pressed, and written down."""

import json

import pytest

from align.demo.data import write_demo
from align.label.comparisons import draw_comparisons, sides
from align.records import Response, Samples, read_questions, write_jsonl
from align.run.folder import RunDir
from tests.browser.chromium import Page, find_chromium
from tests.served import Served

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
NUM_QUESTIONS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's questions with two responses each, as if they had been sampled."""
    folder = tmp_path_factory.mktemp("label")
    write_demo(folder, num_questions=NUM_QUESTIONS, num_eval=1, seed=0)
    this = RunDir(folder / "runs/critic").round(1)
    this.path.mkdir(parents=True)
    lines = []
    for question in read_questions(folder / "questions.jsonl"):
        texts = [f"<b>One</b> of {question.id}", f"Two of {question.id}"]
        responses = [Response(text=text, num_tokens=3) for text in texts]
        lines.append(Samples(id=question.id, question=question, responses=responses, seed=0))
    write_jsonl(this.samples, lines)
    this.manifest.begin("sample", settings={}, inputs={})
    this.manifest.finish("sample", outputs=[this.samples], counts={})
    return folder


@pytest.fixture(scope="module")
def served(folder):
    served = Served(folder, "label", "--round", "1")
    yield served
    served.kill()


def ratings(folder):
    path = folder / "runs/critic/round-1/ratings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(page, comparison, annotator):
    for side, index in zip(("left", "right"), sides(comparison, annotator, 0), strict=True):
        text = json.dumps(comparison.texts[index])
        page.wait(f"document.querySelector('#{side}-text textarea')?.value === {text}")


def visit_as(page, url, name, width):
    page.visit(url, width=width)
    page.wait("document.querySelector('#name input, #name textarea') !== null")
    page.run("document.querySelector('#name input, #name textarea').focus()")
    page.call("Input.insertText", text=name)


def test_a_person_compares_by_keys_and_buttons_goes_back_and_resumes(folder, served, tmp_path):
    drawn = draw_comparisons(RunDir(folder / "runs/critic").round(1), number=100, seed=0)
    assert CHROMIUM is not None
    with Page(CHROMIUM, tmp_path / "profile", (served.url, "data:", "about:", "blob:")) as page:
        visit_as(page, served.url, "anna", width=1200)
        page.press("Enter")
        wait_for(page, drawn[0], "anna")
        page.wait("document.querySelector('#images img')?.naturalWidth > 0")
        page.run("document.activeElement.blur()")
        page.press("1")
        wait_for(page, drawn[1], "anna")
        page.press("2")
        wait_for(page, drawn[2], "anna")
        page.press("Backspace")
        wait_for(page, drawn[1], "anna")
        page.run("document.getElementById('tie').click()")
        wait_for(page, drawn[2], "anna")
        page.wait("document.querySelector('#status textarea, #status input').value.includes('2 of 4 compared')")
        # Another visit, by the same person.
        visit_as(page, served.url, "anna", width=500)
        page.run("document.getElementById('start').click()")
        wait_for(page, drawn[2], "anna")
        assert page.problems == []
    found = ratings(folder)
    assert [(line["question_id"], line["annotator"]) for line in found] == [
        (drawn[index].question.id, "anna") for index in (0, 1, 1)
    ]
    first, second, again = found
    assert first["preferred"] == first["responses"][0] == drawn[0].responses[sides(drawn[0], "anna", 0)[0]]
    assert second["preferred"] == second["responses"][1]
    assert again["preferred"] is None
    served.stop()
    assert "ratings.jsonl" in served.said
