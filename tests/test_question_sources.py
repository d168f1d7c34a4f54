"""Several files of questions in a run: how many of each in a round, whose images, and everything counted by source."""

import json

import pytest
import yaml

from align.check.preflight import run_preflight
from align.config import dump_config, load_config
from align.demo.data import POLICY
from align.errors import UserError
from align.evaluation.evaluate import check_overlap
from align.media.images import question_images
from align.records import Samples, read_jsonl, read_questions
from align.report.funnel import funnels
from align.report.read import read_run
from align.run.folder import RunDir
from align.sources import questions_of_round, read_all_questions
from align.stages.pairs import run_pairs
from align.stages.sample import run_sample
from align.stages.score import run_score
from tests.engines.stub_server import StubServer
from tests.tiny_models import random_image

SIZES = {"vqa": 6, "charts": 4, "ocr": 5}


@pytest.fixture
def folder(tmp_path):
    """Three files of questions with the same ids and names of images, two with images of their own folder."""
    for number, (name, size) in enumerate(SIZES.items()):
        (tmp_path / name / "images").mkdir(parents=True)
        lines = []
        for index in range(size):
            random_image(100 * number + index, 20 + number, 20).save(tmp_path / name / "images" / f"{index}.png")
            lines.append({"id": f"q{index}", "question": f"{name} {index}?", "images": [f"images/{index}.png"]})
        (tmp_path / name / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "ocr" / "questions.jsonl").rename(tmp_path / "ocr.jsonl")
    return tmp_path


def config_of(folder, questions=None, **settings):
    questions = questions or [
        {"file": "vqa/questions.jsonl", "name": "vqa", "weight": 3},
        {"file": "charts/questions.jsonl", "name": "charts"},
        {"file": "ocr.jsonl", "limit": 2, "image_root": "ocr"},
    ]
    values = {"policy": str(POLICY), "questions": questions, "critic": {"kind": "random"}} | settings
    (folder / "align.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "align.yaml")


def test_a_round_takes_limits_first_and_shares_the_rest_by_weight_and_no_question_twice(folder):
    config = config_of(folder, sample={"questions_per_round": 6})
    rounds = [[question.id for question in questions_of_round(config, number)] for number in (1, 2)]
    assert rounds[0] == ["vqa/q0", "vqa/q1", "vqa/q2", "charts/q0", "ocr/q0", "ocr/q1"]
    assert rounds[1] == ["vqa/q3", "vqa/q4", "vqa/q5", "charts/q1", "ocr/q2", "ocr/q3"]
    everything = config_of(folder)
    assert [q.source for q in questions_of_round(everything, 1)] == ["vqa"] * 6 + ["charts"] * 4 + ["ocr"] * 2
    assert len(read_all_questions(everything)) == sum(SIZES.values())


def test_every_question_has_the_image_of_its_own_source(folder):
    config = config_of(folder)
    images = question_images(config)
    for question in read_all_questions(config):
        assert images.size(question.images[0])[0] == 20 + list(SIZES).index(question.source)


def test_an_image_outside_of_its_source_is_refused(folder):
    (folder / "charts/questions.jsonl").write_text('{"id": "q", "question": "?", "images": ["../vqa/images/0.png"]}\n')
    with pytest.raises(UserError, match=r"charts/questions.jsonl: .*lies outside of its source's image root"):
        read_all_questions(config_of(folder))


def test_one_file_and_a_list_of_one_are_taken_as_they_stand(folder):
    for questions in ("vqa/questions.jsonl", ["vqa/questions.jsonl"], [{"file": "vqa/questions.jsonl"}]):
        config = config_of(folder, questions)
        assert read_all_questions(config) == read_questions(folder / "vqa/questions.jsonl")
        assert question_images(config).root == folder / "vqa"


def test_a_list_is_written_as_it_is_read(folder):
    config = config_of(folder)
    (folder / "again.yaml").write_text(dump_config(config))
    assert load_config(folder / "again.yaml") == config


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([{"file": "a/questions.jsonl"}, {"file": "b/questions.jsonl"}], "two sources have the same name"),
        ([{"file": "a.jsonl", "wieght": 2}], r"wieght: unknown key"),
        ([{"file": "a.jsonl", "weight": 0}], r"weight: .*greater than 0"),
        ([], "at least 1 item"),
    ],
)
def test_what_is_wrong_with_a_source_is_said(folder, questions, message):
    (folder / "align.yaml").write_text(yaml.safe_dump({"policy": str(POLICY), "questions": questions}))
    with pytest.raises(UserError, match=message):
        load_config(folder / "align.yaml")


def test_limits_that_leave_nothing_for_the_others_are_refused_before_anything_runs(folder):
    problems = run_preflight(config_of(folder, sample={"questions_per_round": 2})).problems
    assert any("the limits of the sources take 2 questions, and a round has 2" in problem.text for problem in problems)


def test_bad_lines_and_overlap_are_found_in_every_source(folder):
    config = config_of(folder, evaluate={"questions": "vqa/questions.jsonl", "image_root": "vqa"})
    with pytest.raises(UserError, match="6 held-out questions are also trained on"):
        check_overlap(config, read_questions(folder / "vqa/questions.jsonl"))
    (folder / "ocr.jsonl").write_text('{"id": "q"\n')
    problems = run_preflight(config).problems
    assert any("ocr.jsonl:1: not valid JSON" in problem.text for problem in problems)


def test_manifest_and_report_count_by_source(folder):
    server = StubServer(models=("policy-0",))
    try:
        settings = {"questions_per_round": 6, "num_responses": 3}
        sample = settings | {"servers": [{"url": server.url, "model": "policy-{round}"}]}
        config = config_of(folder, sample=sample, server={"compare_prompts": False})
        run_sample(config, 1)
        run_score(config, 1)
        run_pairs(config, 1)
    finally:
        server.stop()
    this = RunDir(config.run_dir).round(1)
    assert {line.id: line.question.source for line in read_jsonl(this.samples, Samples)}["ocr/q1"] == "ocr"
    stages = this.manifest.stages()
    assert stages["sample"].counts["questions_by_source"] == {"vqa": 3, "charts": 1, "ocr": 2}
    assert {"questions vqa", "questions charts", "questions ocr"} <= stages["sample"].inputs.keys()
    assert stages["sample"].settings["sources"]["ocr"] == {"weight": 1.0, "limit": 2}
    assert sum(stages["pairs"].counts["pairs_by_source"].values()) == stages["pairs"].counts["pairs"] > 0
    (funnel,) = funnels(read_run(config.run_dir))
    assert ("sample: questions of vqa", 3) in funnel.others
