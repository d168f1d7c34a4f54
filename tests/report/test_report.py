"""The report of a made-up run, read back as HTML: what stands in it, and what must never."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align.errors import UserError
from align.records import Evaluation, read_jsonl, write_jsonl
from align.report import write_report
from align.report.metrics import metric
from tests.report.fake_run import FakeRun

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """All elements with their attributes, the text outside scripts and styles, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.faults: list[str] = []
        self.parts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \t\r\n]+", " ", " ".join(self.parts))

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.faults
    assert not page.stack
    return page


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    FakeRun(root / "critic").build()
    FakeRun(root / "control", skill=(0.45, 0.45, 0.46, 0.44), random_critic=True, seed=1, num_training=30).build()
    return root


@pytest.fixture
def run(built, tmp_path) -> Path:
    """A copy that a test may damage; images stay where they are."""
    return Path(shutil.copytree(built / "critic", tmp_path / "critic"))


def test_the_page_needs_nothing_from_outside(built):
    html = write_report(built / "critic", control=built / "control").read_text(encoding="utf-8")
    page = Page(html)
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp", re.sub(r"data:image/[^\"]*", "", html))
    assert not any(tag in ("link", "iframe", "object", "embed", "base") for tag, _ in page.elements)
    assert all(value.startswith("data:image/") for value in page.attributes("src"))
    assert all(value.startswith("#") for value in page.attributes("href"))
    assert html.count("<script>") == 1


def test_every_mean_and_interval_of_the_evaluations_stands_in_the_page(built):
    text = read(write_report(built / "critic")).text
    for number in range(4):
        metrics = json.loads((built / f"critic/round-{number}/evaluation.json").read_text())["metrics"]
        for name, item in metrics.items():
            show = metric(name).show
            assert show(item["mean"]) in text
            if item["high"] > item["low"]:
                assert f"{show(item['low'])} to {show(item['high'])}" in text


def test_the_verdict_comes_first_with_the_paired_change(built):
    page = read(write_report(built / "critic"))
    first = json.loads((built / "critic/round-0/evaluation.json").read_text())["metrics"]["sampled_accuracy"]["mean"]
    last = json.loads((built / "critic/round-3/evaluation.json").read_text())["metrics"]["sampled_accuracy"]["mean"]
    show = metric("sampled_accuracy").show
    sentence = f"Better: right answers rose from {show(first)} to {show(last)}."
    assert sentence in page.text
    assert f"+{(last - first) * 100:.1f} points from the first policy to round 3" in page.text
    assert "paired" in page.text
    headings = [tag for tag, _ in page.elements if tag in ("h1", "h2")]
    assert headings[0] == "h1"


def test_the_control_stands_beside_the_run(built):
    alone = read(write_report(built / "critic"))
    both = read(write_report(built / "critic", control=built / "control"))
    dots = [attrs for tag, attrs in both.elements if tag == "circle" and "control" in (attrs["class"] or "")]
    assert dots
    assert not [attrs for tag, attrs in alone.elements if tag == "circle" and "control" in (attrs["class"] or "")]
    assert "The control (control) moved by" in both.text
    assert "the two intervals do not touch" in both.text


def test_a_random_run_is_not_called_better(built):
    page = read(write_report(built / "control"))
    assert "No improvement shown" in page.text
    assert "The pairs taught hardly anything" in page.text


def test_a_round_worse_than_its_parent_says_so_loudly(tmp_path):
    run = FakeRun(tmp_path / "worse", skill=(0.4, 0.9, 0.3), num_held_out=80).build()
    page = read(write_report(run))
    assert "Round 2 is worse than round 1" in page.text
    assert [attrs for _, attrs in page.elements if attrs.get("role") == "alert"]
    assert "Worse than the round before: right when sampled" in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)> {{ 7 * 7 }} {% raw %}',
    "'; alert(1) // </p></details></style><b>bold</b>",
    "nul \x00 escape \x1b[31m SURROGATE \u202e right to left",
    "https://example.com/ javascript:alert(1)",
    "   ",
    "long " * 900,
]


def test_responses_cannot_inject_anything(tmp_path):
    fake = FakeRun(tmp_path / "hostile", skill=(0.5, 0.5), num_held_out=30, num_training=10, texts=HOSTILE)
    run = fake.build()
    line = read_jsonl(run / "round-0/evaluation.jsonl", Evaluation)
    hostile = [
        item.model_copy(
            update={
                "question": item.question.model_copy(
                    update={"question": HOSTILE[1], "answer": HOSTILE[2], "meta": {"task": HOSTILE[index % 2]}}
                )
            }
        )
        for index, item in enumerate(line)
    ]
    for number in (0, 1):
        path = run / f"round-{number}/evaluation.jsonl"
        write_jsonl(path, hostile)
        path.write_text(path.read_text(encoding="utf-8").replace("SURROGATE", "\\ud800"), encoding="utf-8")
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.faults
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert all(value.startswith("data:image/") for value in page.attributes("src"))
    for text in HOSTILE[:4]:
        assert text in "".join(page.parts)
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", html)


def test_the_policy_for_content_names_the_one_script(built):
    import base64
    import hashlib

    html = write_report(built / "critic").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", html, flags=re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    policy = next(value for value in Page(html).attributes("content") if "script-src" in value)
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_writing_twice_gives_the_same_bytes(built, tmp_path):
    one = write_report(built / "critic", control=built / "control", out=tmp_path / "one.html")
    two = write_report(built / "critic", control=built / "control", out=tmp_path / "two.html")
    assert one.read_bytes() == two.read_bytes()


def test_the_report_does_not_change_the_run(built, run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_report(run, out=tmp_path / "out.html")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_has_only_its_configuration_is_reported(run):
    for folder in run.glob("round-*"):
        shutil.rmtree(folder)
    text = read(write_report(run)).text
    assert "Not evaluated yet." in text
    assert "Nothing has been trained yet." in text


def test_no_evaluation_at_all_is_reported(run):
    for folder in run.glob("round-*"):
        (folder / "evaluation.json").unlink()
        (folder / "evaluation.jsonl").unlink()
    text = read(write_report(run)).text
    assert "Not evaluated" in text
    assert "Agrees with reference answers" in text


def test_one_round_only_is_too_early(run):
    for number in (1, 2, 3):
        shutil.rmtree(run / f"round-{number}")
    text = read(write_report(run)).text
    assert "Too early to say" in text


def test_without_the_responses_the_interval_is_unpaired_and_says_so(run):
    for folder in run.glob("round-*"):
        (folder / "evaluation.jsonl").unlink()
    text = read(write_report(run)).text
    assert "Better: right answers rose" in text
    assert "unpaired: the responses of both rounds are not on disk" in text


def test_a_running_stage_is_shown_with_its_progress(run):
    path = run / "round-3/manifest.json"
    data = json.loads(path.read_text())
    data["stages"] = {"sample": {"status": "running", "settings": {}, "inputs": {}}}
    path.write_text(json.dumps(data))
    lines = (run / "round-3/samples.jsonl").read_text().splitlines(keepends=True)
    (run / "round-3/samples.part-0.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    for name in ("samples.jsonl", "scores.jsonl", "pairs.jsonl", "evaluation.json", "evaluation.jsonl"):
        (run / "round-3" / name).unlink()
    text = read(write_report(run)).text
    assert "Round 3 sample has begun and not ended; 7 questions are finished." in text


def test_damaged_files_are_named_and_the_rest_is_shown(run):
    (run / "round-2/evaluation.json").write_text("{")
    (run / "round-2/manifest.json").write_text("[broken")
    scores = run / "round-1/scores.jsonl"
    scores.write_text(scores.read_text().replace('"rewards": [', '"rewards": ["much", '))
    text = read(write_report(run)).text
    assert re.search(r"round-2/evaluation\.json: the metrics of the evaluation are damaged", text)
    assert "manifest is damaged" in text
    assert re.search(r"round-1/scores\.jsonl:\d+: not a valid Judgement: rewards\.0", text)
    assert "Better: right answers rose" in text


def test_a_configuration_of_another_version_is_still_read(run):
    (run / "align.yaml").write_text("policy: x\nnew_key: 1\ncritic: {kind: pairwise}\n")
    text = read(write_report(run)).text
    assert "new_key" in text
    assert "Better: right answers rose" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "nowhere")


def test_missing_images_are_counted(run, tmp_path):
    text = read(write_report(run, image_root=tmp_path, evaluation_image_root=tmp_path)).text
    assert "Images that could not be opened: 1 × there is no image" in text


def test_embedded_questions_are_capped_and_the_page_says_so(built, tmp_path):
    page = read(write_report(built / "critic", out=tmp_path / "r.html", max_held_out=8, max_training=5))
    items = [attrs["data-kind"] for tag, attrs in page.elements if tag == "details" and attrs.get("class") == "q"]
    assert len([kind for kind in items if kind != "training"]) == 8
    assert items.count("training") == 5
    assert "8 of 60 held-out questions" in page.text
    assert "5 of 60 training questions" in page.text


def test_every_kind_of_outcome_is_shown(built):
    page = read(write_report(built / "critic", max_held_out=8))
    kinds = {attrs.get("data-kind") for tag, attrs in page.elements if tag == "details"}
    assert {"gained", "lost", "stayed right", "stayed wrong", "training"} <= kinds


def test_verdicts_and_rationales_of_training_questions_are_shown(built):
    page = read(write_report(built / "critic"))
    assert "fits the picture." in page.text
    assert any("verdicts" in (attrs.get("class") or "") for tag, attrs in page.elements if tag == "table")
    assert "chosen" in page.text


def test_the_reference_curve_is_optional(built, tmp_path):
    with_it = read(write_report(built / "critic", out=tmp_path / "a.html"))
    without = read(write_report(built / "critic", out=tmp_path / "b.html", reference_curve=False))
    assert "Valley2-DPO" in with_it.text
    assert "Valley2-DPO" not in without.text


def test_counts_and_costs_are_those_of_the_manifests(built):
    text = read(write_report(built / "critic")).text
    stages = [json.loads((built / f"critic/round-{n}/manifest.json").read_text())["stages"] for n in range(4)]
    for entry in stages[1:]:
        counts = {name: stage["counts"] for name, stage in entry.items()}
        assert f"questions asked {counts['sample']['questions']} " in text
        assert f"responses scored by {counts['score']['verdicts']:,} verdicts {counts['score']['scored']} " in text
        assert f"preference pairs {counts['pairs']['pairs']} " in text
        assert f"{counts['sample']['tokens']:,}" in text
    seconds = sum(stage["seconds"] for entry in stages for stage in entry.values())
    assert f"{int(seconds) // 60} min {round(seconds) % 60} s in all" in text


def test_a_place_that_cannot_be_written_is_refused(built, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_report(built / "critic", out=tmp_path)


def test_the_folder_of_the_report_is_made(built, tmp_path):
    assert write_report(built / "critic", out=tmp_path / "new" / "r.html").is_file()


def test_every_row_of_every_table_has_a_cell_under_each_heading(run):
    for number in (1, 2, 3):
        path = run / f"round-{number}/evaluation.json"
        numbers = json.loads(path.read_text())
        wins = {"mean": 0.6, "low": 0.55, "high": 0.65, "count": 60}
        numbers["metrics"] |= {"win_rate_initial": wins} | ({"win_rate_parent": wins} if number > 1 else {})
        path.write_text(json.dumps(numbers))
    html = write_report(run).read_text(encoding="utf-8")
    tables = re.findall(r"<table.*?</table>", html, flags=re.S)
    assert len(tables) > 4
    for table in tables:
        rows = [len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>.*?</tr>", table, flags=re.S)]
        assert len(set(rows)) == 1, table[:300]
    assert "0 → 1" in html
    assert "Wins against the round before" in html


def test_paths_are_shown_without_where_they_lie(run, tmp_path):
    text = read(write_report(run, image_root=tmp_path, evaluation_image_root=tmp_path)).text
    assert str(tmp_path.parent) not in text
    assert "…/" in text
