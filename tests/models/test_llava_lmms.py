"""LLaVA-OneVision in its original format: sizes, settings and what the goldens do not reach."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from align.dpo.tokenize import PromptCounter
from align.errors import UserError
from align.media.images import ImageStore
from align.models.llava_lmms import LlavaQwenConfig, LlavaQwenForCausalLM, LlavaQwenProcessor
from align.models.llava_lmms.layout import Tiling
from align.models.llava_lmms.processing import gather_frames
from align.models.load import load_model, load_processor
from align.models.valley_eagle.tiles import parse_canvases

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_ov_original_tiny"
ONEVISION = Tiling(parse_canvases("(1x1),...,(6x6)", 384), edge_px=384, side=27, max_tiles=9)


@pytest.mark.parametrize(
    ("width", "height", "num_tokens"),
    [
        (336, 336, 1485),
        (384, 384, 1485),
        (500, 375, 1728),
        (640, 480, 2929),
        (800, 600, 4725),
        (1024, 768, 4725),
        (1024, 1024, 7371),
        (1920, 1080, 7269),
        (4000, 3000, 7309),
        (1024, 899, 6551),
        (100, 1000, 1539),
    ],
)
def test_visual_tokens_of_an_image(width, height, num_tokens):
    assert ONEVISION.layout(width, height).num_tokens(27) == num_tokens


def test_a_map_just_above_its_limit_is_left_as_it_is():
    """1152 x 1152 has 9 tiles, the limit itself; 10 tiles are sqrt(10/9) = 1.05 times it along a side."""
    assert (ONEVISION.layout(1152, 1152).rows, ONEVISION.layout(1152, 1152).columns) == (81, 81)
    wide = ONEVISION.layout(1920, 768)
    assert (wide.tile_columns, wide.tile_rows, wide.rows, wide.columns) == (5, 2, 54, 135)


def test_the_published_7b_has_its_published_size():
    """Derived by hand; Qwen2-7B has 7,615,616,512 parameters, and the newline is one more row."""
    with torch.device("meta"):
        model = LlavaQwenForCausalLM(LlavaQwenConfig())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    language = sum(size for name, size in sizes.items() if ".vision_tower" not in name and "mm_projector" not in name)
    vision = sum(size for name, size in sizes.items() if ".vision_tower" in name)
    projector = sum(size for name, size in sizes.items() if "mm_projector" in name)
    layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert vision == 26 * layer + (3 * 14 * 14 * 1152 + 1152) + 729 * 1152 + 2 * 1152 == 397_747_744
    assert projector == (1152 * 3584 + 3584) + (3584 * 3584 + 3584) == 16_980_992
    assert language == 7_615_616_512 + 3584
    assert sum(sizes.values()) == 8_030_348_832
    assert len(sizes) == 3 + 28 * 12 + (5 + 26 * 16) + 4 + 1 == 765


@pytest.mark.parametrize("model_type", ["llava", "llava_qwen"])
def test_architectures_decide_whatever_the_model_type_says(model_type, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    assert type(load_model(folder)) is LlavaQwenForCausalLM
    assert type(load_processor(folder)) is LlavaQwenProcessor


def test_the_auto_classes_open_a_llava_qwen_folder():
    assert type(AutoConfig.from_pretrained(GOLDEN)) is LlavaQwenConfig
    assert type(AutoModelForImageTextToText.from_pretrained(GOLDEN)) is LlavaQwenForCausalLM
    assert type(AutoProcessor.from_pretrained(GOLDEN)) is LlavaQwenProcessor


def test_the_published_config_without_encoder_sizes_means_siglip_without_its_last_layer():
    config = LlavaQwenConfig()
    assert (config.vision_config.num_hidden_layers, config.vision_config.vision_use_head) == (26, False)
    assert config.rope_parameters["rope_theta"] == 1000000.0
    assert (config.patches_per_side, config.image_token_id) == (27, 151646)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type to be 'spatial_unpad', found 'flat'"),
        ({"mm_newline_position": "grid"}, "mm_newline_position to be 'one_token', found 'grid'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type like mlp2x_gelu, found 'linear'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, "mm_vision_tower to be siglip"),
        ({"image_grid_pinpoints": [[384, 500]]}, "multiples of 384 pixels"),
        ({"image_token_index": 152064}, "image_token_index below vocab_size 152064, found 152064"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LlavaQwenConfig(**change)


def test_settings_change_the_prompt_and_the_tiles():
    processor = load_processor(GOLDEN, default_system="Be brief.", image_grid_pinpoints="(1x1),...,(1x2)")
    text = processor.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert processor.num_image_tokens(1024, 1024) == 1485
    own_default = load_processor(GOLDEN, default_system=None)
    text = own_default.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_an_unknown_setting_or_mode_is_refused_with_the_nearest_known_one():
    with pytest.raises(UserError, match="did you mean image_aspect_ratio"):
        load_processor(GOLDEN, image_aspect="pad")
    with pytest.raises(UserError, match="expected pad, anyres or anyres_max_N, found 'square'"):
        load_processor(GOLDEN, image_aspect_ratio="square")


def test_sixteen_frames_of_a_video_are_looked_at_first_and_last_included():
    processor = load_processor(GOLDEN)
    indices = processor.frame_indices(100)
    assert (len(indices), indices[0], indices[-1]) == (16, 0, 99)
    assert indices[1] == 6  # 99 / 15 = 6.6, truncated
    assert load_processor(GOLDEN, num_video_frames=3).frame_indices(10) == [0, 4, 9]


def test_a_video_may_stand_beside_an_image():
    processor, model = load_processor(GOLDEN), load_model(GOLDEN)
    frames = [Image.new("RGB", (60, 40), (shade, 0, 0)) for shade in (0, 120, 240)]
    content = [
        {"type": "video", "video": frames},
        {"type": "text", "text": "Is this in "},
        {"type": "image", "image": Image.new("RGB", (50, 50))},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    assert inputs["image_layouts"][:, 0].tolist() == [3, 0]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == (3 * 196 + 1) + 1485
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_layouts_of_other_views_are_refused():
    model = load_model(GOLDEN)
    processor = load_processor(GOLDEN)
    inputs = processor(images=[Image.new("RGB", (50, 50))], text="<image>", return_tensors="pt")
    with pytest.raises(ValueError, match="image_layouts speak of 2 views, pixel_values hold 1"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="images need image_layouts too"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


def test_images_known_as_frames_are_one_video(tmp_path):
    """As the stages ask: the frames of a video are images of the question, rendered before they are opened."""
    golden = np.load(GOLDEN / "golden.npz")
    case = next(case for case in json.loads((GOLDEN / "cases.json").read_text()) if case["name"] == "video8")
    store, processor = ImageStore(GOLDEN), load_processor(GOLDEN)
    frames = [store.open(f"{name}#frame") for name in case["images"]]
    text = case["turns"][0].removeprefix("<image>\n")
    content = [{"type": "image"}] * 8 + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[frames], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == case["seq_len"]
    assert inputs["image_layouts"].tolist() == [[8, 0, 0, 0, 0, 0, 0, 14, 14]]
    with torch.no_grad():
        logits = load_model(GOLDEN)(**inputs).logits[0, -1].numpy()
    np.testing.assert_allclose(logits, golden["video8/last_logits"], rtol=0, atol=1e-4)
    counted = PromptCounter(processor).count(prompt, [frame.size for frame in frames], are_frames=[True] * 8)
    assert counted == case["seq_len"]


def test_an_image_between_frames_parts_two_videos():
    frame, still = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))
    frame.info["frame_file"] = True
    images = [frame, frame, still, frame]
    text, stills, videos = gather_frames("<image> <image> and <image>, <image>?", images)
    assert text == "<video> and <image>, <video>?"
    assert (stills, videos) == ([still], [[frame, frame], [frame]])
