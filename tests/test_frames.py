"""Questions about videos become questions about frames, all the way through sampling, scoring and DPO."""

import json

import pytest

from align.errors import UserError
from align.media.images import ImageStore
from align.media.video import frame_references, read_frames, uniform
from align.models.open_image import is_frame
from align.records import Question
from tests.stage_runs import align, make_project, write_lines
from tests.test_video import write_video


def test_frames_of_a_file_open_like_images(tmp_path):
    write_video(tmp_path / "clip.mp4")
    store = ImageStore(tmp_path)
    references = frame_references(store, "clip.mp4", uniform)
    assert references == [f"clip.mp4#frame={index}" for index in uniform(13)]
    expected = read_frames(tmp_path / "clip.mp4", 8)
    for reference, frame in zip(references, expected, strict=True):
        assert store.open(reference).tobytes() == frame.tobytes()
        assert store.size(reference) == frame.size
    assert len({store.sha256(reference) for reference in references}) == 8


def test_frames_of_a_folder_are_images_known_as_frames(tmp_path):
    (tmp_path / "clip").mkdir()
    for index, frame in enumerate(read_frames(_clip(tmp_path), 3)):
        frame.save(tmp_path / "clip" / f"{index}.png")
    store = ImageStore(tmp_path)
    references = frame_references(store, "clip/", lambda count, rate: [0, count - 1])
    assert references == ["clip/0.png#frame", "clip/2.png#frame"]
    for reference in references:
        name = reference.removesuffix("#frame")
        assert store.open(reference).tobytes() == store.open(name).tobytes()
        assert (store.size(reference), store.sha256(reference)) == (store.size(name), store.sha256(name))
        assert is_frame(store.open(reference))
        assert not is_frame(store.open(name))


def _clip(folder):
    write_video(folder / "clip.mp4")
    return folder / "clip.mp4"


@pytest.mark.parametrize("video", ["../clip.mp4", "../outside", "none.mp4", "https://example.com/a.mp4"])
def test_videos_outside_the_root_are_refused(tmp_path, video):
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    _clip(tmp_path)
    with pytest.raises(UserError):
        frame_references(ImageStore(tmp_path / "root"), video, uniform)


def test_the_question_keeps_the_name_of_its_video():
    question = Question(id="q", question="What happens?", images=["a.png"], video="clip.mp4")
    asked = question.with_frames(["clip.mp4#frame=0"])
    assert [part["type"] for part in asked.messages()[0]["content"]] == ["image", "image", "text"]
    assert (asked.video, asked.meta["video"]) == (None, "clip.mp4")
    with pytest.raises(AssertionError, match="were not picked"):
        question.messages()


def test_a_video_is_sampled_scored_trained_on_and_evaluated(tmp_path):
    folder = make_project(tmp_path)
    write_video(folder / "images" / "clip.mp4")
    video = {"id": "v0", "question": "What happens?", "video": "images/clip.mp4", "answer": "rain"}
    first = json.loads((folder / "questions.jsonl").read_text().splitlines()[0])
    write_lines(folder / "questions.jsonl", [video, first])
    write_lines(folder / "eval.jsonl", [video | {"id": "v1", "question": "What happens now?"}])
    frames = ["--set", "model.video_frames=2", "--set", "evaluate.limit=1"]
    for stage in ("sample", "score", "dpo", "evaluate"):
        result = align(folder, stage, *(["--round", "1"] if stage == "evaluate" else []), *frames)
        assert result.returncode == 0, result.stderr
    pairs = [json.loads(line) for line in (folder / "runs/run/round-1/pairs.jsonl").read_text().splitlines()]
    assert pairs[0]["images"] == ["images/clip.mp4#frame=0", "images/clip.mp4#frame=12"]


def test_a_broken_video_is_named_before_weights_are_loaded(tmp_path):
    folder = make_project(tmp_path)
    (folder / "images" / "clip.mp4").write_bytes(b"no video")
    write_lines(folder / "questions.jsonl", [{"id": "v0", "question": "What?", "video": "images/clip.mp4"}])
    result = align(folder, "sample")
    assert result.returncode == 2
    assert "question 'v0'" in result.stderr
    assert "cannot be read" in result.stderr
