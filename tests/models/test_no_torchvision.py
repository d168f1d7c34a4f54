"""Processors of transformers that are opened without torchvision."""

import importlib.util

import pytest

from align.models import no_torchvision as image_only
from align.models.load import load_processor
from tests.tiny_models import random_image
from tests.tiny_vlms import VLMS, save

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed: transformers' own are used"
)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return load_processor(save("mistral3", tmp_path_factory.mktemp("mistral3") / "checkpoint"))


def test_an_image_of_mistral_is_a_grid_with_a_break_behind_every_row_and_an_end_behind_the_last(mistral):
    """40 x 30 pixels fit 32 as 32 x 24; 8 pixels are a token: 3 rows of 4."""
    ids = mistral(text=["a[IMG]b"], images=[[random_image(0, 40, 30)]])["input_ids"][0]
    row = ["[IMG]"] * 4
    grid = [*row, "[IMG_BREAK]", *row, "[IMG_BREAK]", *row, "[IMG_END]"]
    assert mistral.tokenizer.convert_ids_to_tokens(ids) == ["a", *grid, "b"]


def test_images_are_dealt_out_in_the_order_of_their_marks(mistral):
    images = [random_image(0, 8, 8), random_image(1, 16, 8), random_image(2, 8, 16)]
    inputs = mistral(text=["[IMG][IMG]", "[IMG]"], images=[images[:2], images[2:]], padding=True, return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[8, 8], [8, 16], [16, 8]]
    assert inputs["pixel_values"].shape == (3, 3, 16, 16)
    counts = (inputs["input_ids"] == mistral.image_token_id).sum(dim=1)
    assert counts.tolist() == [1 + 2, 2]


def test_images_and_marks_must_agree_in_number(mistral):
    with pytest.raises(ValueError, match="expected 2 images, as many as the texts name, found 1"):
        mistral(text=["[IMG][IMG]"], images=[[random_image(0)]])


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_processor_keeps_its_name_and_templates_without_its_video_part(name, tmp_path):
    folder = save(name, tmp_path / "checkpoint")
    processor = load_processor(folder)
    original = VLMS[name]()[1]
    assert type(processor).__name__ == type(original).__name__ or name == "llava_onevision"
    assert image_only.VIDEO_ATTRIBUTE not in type(processor).get_attributes()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    assert processor.apply_chat_template(messages) == original.apply_chat_template(messages)
    processor.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert load_processor(tmp_path / "again").apply_chat_template(messages) == original.apply_chat_template(messages)
