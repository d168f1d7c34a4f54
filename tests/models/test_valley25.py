"""Valley2.5: sizes, settings and what the goldens do not reach."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from align.models.load import load_model, load_processor
from align.models.valley25 import Valley25Config, Valley25Processor, ValleyQwen3ForCausalLM
from tests.models.goldens import VALLEY25

GOLDEN = Path(__file__).parents[1] / "golden" / "valley25_tiny"


@pytest.mark.parametrize(
    ("width", "height", "unlimited", "limited"),
    [
        (3, 3, 4, 4),
        (384, 384, 196, 196),
        (500, 375, 234, 234),
        (480, 640, 391, 391),
        (800, 600, 609, 609),
        (1024, 768, 999, 713),
        (1024, 1024, 1369, 729),
        (1280, 720, 1196, 700),
        (1920, 1080, 2691, 700),
        (2048, 512, 1314, 702),
        (4000, 3000, 15301, 713),
        (100, 1000, 144, 144),
        (899, 1024, 1184, 725),
    ],
)
def test_visual_tokens_of_an_image(width, height, unlimited, limited):
    assert load_processor(GOLDEN).num_image_tokens(width, height) == unlimited
    assert load_processor(GOLDEN, max_pixels=571536).num_image_tokens(width, height) == limited


def test_several_images_have_a_limit_of_their_own():
    processor = load_processor(GOLDEN)
    assert processor.num_image_tokens(1200, 900, num_images=2) == 234  # 26 x 36 patches, as in the golden `capped`
    assert processor.num_image_tokens(1200, 900) == 43 * 32
    inputs = processor(images=[[Image.new("RGB", (1200, 900))] * 2], text="<image> <image>", return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 26, 36]] * 2


def test_the_inferred_full_size_adds_up():
    """Qwen3-8B 8,190,735,360; the Qwen2-VL encoder 675,759,104 with a merger of 44,575,744, here a wider one.

    The merger's width, 65,536, and the vocabulary, 151,936, are inferred and not read from a published file.
    """
    with torch.device("meta"):
        model = ValleyQwen3ForCausalLM(Valley25Config())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    merger = sum(size for name, size in sizes.items() if ".merger." in name)
    vision = sum(size for name, size in sizes.items() if "qwen2vl_vision_tower" in name)
    assert merger == 2 * 1280 + (5120 * 65536 + 65536) + (65536 * 4096 + 4096) == 604_051_968
    assert vision - merger == 675_759_104 - 44_575_744
    assert sum(sizes.values()) - vision == 8_190_735_360
    assert sum(sizes.values()) == 9_425_970_688
    assert len(sizes) == 3 + 36 * 11 + (1 + 32 * 12) + 6


def test_the_auto_classes_open_it_by_its_architecture():
    assert type(AutoConfig.from_pretrained(GOLDEN)) is Valley25Config
    assert type(AutoModelForImageTextToText.from_pretrained(GOLDEN)) is ValleyQwen3ForCausalLM
    assert type(AutoProcessor.from_pretrained(GOLDEN)) is Valley25Processor


@pytest.mark.parametrize("sharded", [False, True])
def test_the_mergers_width_is_read_from_the_weights_where_the_config_lacks_it(sharded, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    del config["navit_merger_hidden_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    if sharded:
        tensors = load_file(folder / "model.safetensors")
        halves = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
        for file, names in halves.items():
            save_file({name: tensors[name] for name in names}, folder / file)
        weight_map = {name: file for file, names in halves.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "model.safetensors").unlink()
    model = load_model(folder)
    assert model.config.navit_merger_hidden_dim == 320
    assert model.model.qwen2vl_vision_tower.merger.mlp[0].weight.shape == (320, 128)


def test_a_checkpoint_with_siglip_is_refused():
    with pytest.raises(ValueError, match="expected only_navit true"):
        Valley25Config(only_navit=False)


def test_keywords_of_the_template_reach_it():
    processor = load_processor(GOLDEN)
    template = "{{ messages[-1].content }}{% if enable_thinking %}<think>{% endif %}"
    messages = [{"role": "user", "content": "Why?"}]
    texts = [
        processor.apply_chat_template(messages, chat_template=template, enable_thinking=thinking)
        for thinking in (True, False)
    ]
    assert texts == ["Why?<think>", "Why?"]


def test_text_only_rows_may_stand_beside_rows_with_images():
    processor, model = load_processor(GOLDEN), load_model(GOLDEN)
    image = Image.new("RGB", (60, 90), (200, 10, 10))
    alone = [
        processor(images=[image], text="<image> red?", return_tensors="pt"),
        processor(text="red", return_tensors="pt"),
    ]
    both = processor(images=[[image], []], text=["<image> red?", "red"], padding_side="right", return_tensors="pt")
    with torch.no_grad():
        together = model(**both).logits
        for row, inputs in enumerate(alone):
            length = inputs["input_ids"].shape[1]
            torch.testing.assert_close(together[row, :length], model(**inputs).logits[0], rtol=0, atol=1e-5)


def test_the_wide_merger_is_recomputed_under_gradient_checkpointing():
    processor, model = load_processor(GOLDEN), load_model(GOLDEN)
    inputs = processor(images=[Image.new("RGB", (60, 90), (9, 99, 9))], text="<image> green", return_tensors="pt")
    gradients = []
    for recompute in (False, True):
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.model.qwen2vl_vision_tower.merger.gradient_checkpointing
        model.zero_grad()
        model(**inputs).logits.sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_video_is_its_frames_as_images():
    case = VALLEY25.cases["video8"]
    frames = [GOLDEN / path for path in case["images"]]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": case["conversation"][0]["content"]}]
    inputs = load_processor(GOLDEN).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = VALLEY25.model.generate(**inputs, max_new_tokens=12, do_sample=False, **VALLEY25.greedy)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy"]
