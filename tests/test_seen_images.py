import hashlib
import json

import pytest
from PIL import Image

from align.errors import UserError
from align.media.images import ImageStore
from align.records import Question
from align.run.image_hashes import record_or_verify_images


@pytest.fixture
def store(tmp_path):
    for name, colour in (("a.bmp", "red"), ("b.bmp", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    return ImageStore(tmp_path)


def ask(*images):
    return Question(id="q", question="?", images=list(images))


def test_an_image_that_was_replaced_by_one_of_the_same_size_is_named(store, tmp_path):
    noted = tmp_path / "images.json"
    record_or_verify_images(noted, store, [ask("a.bmp"), ask("b.bmp")])
    assert json.loads(noted.read_text())["a.bmp"] == hashlib.sha256((tmp_path / "a.bmp").read_bytes()).hexdigest()
    (tmp_path / "a.bmp").write_bytes((tmp_path / "b.bmp").read_bytes())
    record_or_verify_images(noted, store, [ask("b.bmp")])
    with pytest.raises(UserError, match=r"'a\.bmp' is not the one that was used so far"):
        record_or_verify_images(noted, store, [ask("b.bmp", "a.bmp")])


def test_images_that_come_later_are_noted_too(store, tmp_path):
    noted = tmp_path / "images.json"
    record_or_verify_images(noted, store, [ask("a.bmp")])
    record_or_verify_images(noted, store, [ask("b.bmp")])
    assert set(json.loads(noted.read_text())) == {"a.bmp", "b.bmp"}


def test_frames_of_a_video_count_as_their_file_once(store, tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"not opened here")
    assert set(store.file_hashes(["film.mp4#frame=3", "film.mp4#frame=9", "./a.bmp", "a.bmp#frame"])) == {
        "film.mp4",
        "a.bmp",
    }
