"""`align check`: a run's data looked over, and held against evaluation images by hash and by a vision tower."""

import pytest
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from align.check.contamination import report_text, run_check
from align.errors import UserError
from align.records import Question, read_jsonl
from tests.critic_runs import config_of
from tests.data.sources import picture, save_pictures, write_jsonl
from tests.stage_runs import align


@pytest.fixture
def folder(tmp_path):
    """Six questions: one image is torn, one tiny, one repeats another, and one is near to an evaluation image."""
    save_pictures(tmp_path / "images", 4)
    (tmp_path / "images/torn.png").write_bytes((tmp_path / "images/1.png").read_bytes()[:300])
    picture(9, 20, 20).save(tmp_path / "images/tiny.png")
    picture(2).resize((128, 96), Image.Resampling.BICUBIC).save(tmp_path / "images/again.png")
    names = ["1", "2", "3", "torn", "tiny", "again"]
    write_jsonl(
        tmp_path / "questions.jsonl",
        [{"id": name, "question": "What?", "images": [f"images/{name}.png"]} for name in names],
    )
    (tmp_path / "held").mkdir()
    picture(3).save(tmp_path / "held/h.jpg", quality=70)
    picture(20).save(tmp_path / "held/i.jpg", quality=70)
    write_jsonl(
        tmp_path / "held/eval.jsonl",
        [{"id": "e0", "question": "Who?", "images": ["i.jpg"]}, {"id": "e1", "question": "Who?", "images": ["h.jpg"]}],
    )
    return tmp_path


def test_every_fault_of_the_images_is_found_and_the_good_rest_can_be_written(folder):
    config = config_of(folder)
    report = run_check(config, against=folder / "held/eval.jsonl", write=folder / "clean.jsonl")
    assert (report.records, report.images, report.same_pictures) == (6, 6, 1)
    assert set(report.bad_images) == {"images/torn.png", "images/tiny.png"}
    assert [(near.image, near.evaluation_image, near.evaluation_question) for near in report.near] == [
        ("images/3.png", "h.jpg", "e1")
    ]
    assert [question.id for question in read_jsonl(folder / "clean.jsonl", Question)] == ["1", "2", "again"]
    assert "1 records have an image near to an evaluation image" in report_text(report)


def test_the_run_s_own_evaluation_questions_are_compared_by_default(folder):
    config = config_of(folder, evaluate={"questions": "held/eval.jsonl", "image_root": "held"})
    assert [near.image for near in run_check(config).near] == ["images/3.png"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tiny random vision encoder: the same picture gives the same vector."""
    folder = tmp_path_factory.mktemp("tower")
    import torch

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_vision_tower_finds_near_pictures_by_cosine(folder, tower):
    config = config_of(folder, model={"dtype": "float32"})
    found = run_check(config, against=folder / "held/eval.jsonl", tower=str(tower), max_bits=0, min_cosine=0.999)
    assert ("images/3.png", "h.jpg") in {(near.image, near.evaluation_image) for near in found.near}
    assert all(near.cosine is not None and near.cosine >= 0.999 for near in found.near)
    apart = run_check(config, against=folder / "held/eval.jsonl", tower=str(tower), max_bits=0, min_cosine=1.0001)
    assert not apart.near


def test_a_tower_without_anything_to_compare_with_is_told(folder, tower):
    with pytest.raises(UserError, match="name evaluation questions with --against"):
        run_check(config_of(folder), tower=str(tower))


def test_the_command_says_what_it_found(folder):
    config_of(folder)
    result = align(
        folder,
        "check",
        "--data-only",
        "--against",
        "held/eval.jsonl",
        "--report",
        "check.json",
        "--write",
        "clean.jsonl",
    )
    assert result.returncode == 0, result.stderr
    assert "6 records with 6 different images" in result.stdout
    assert "images/3.png ~ h.jpg" in result.stdout
    assert (folder / "check.json").exists()
    assert (folder / "clean.jsonl").exists()


def test_data_and_init_lead_to_a_run_that_checks_clean(folder):
    table = folder / "table.csv"
    table.write_text("question,image\nWhat?,images/1.png\nWho?,images/torn.png\nWhy?,images/2.png\n")
    made = align(folder, "data", "table.csv", "--out", "mine")
    assert made.returncode == 0, made.stderr
    assert "2 of 3 rows -> mine/questions.jsonl" in made.stdout
    assert "left out: image cannot be read (1)" in made.stdout
    assert "table.csv:3: left out" in made.stderr
    assert align(folder, "init", "new", "--questions", "../mine/questions.jsonl", "--policy", "p").returncode == 0
    checked = align(folder, "check", "--data-only", "--config", "new/align.yaml", "--set", "image_root=..")
    assert checked.returncode == 0, checked.stderr
    assert "2 records with 2 different images" in checked.stdout
