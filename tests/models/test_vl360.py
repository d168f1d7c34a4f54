"""360VL beyond its golden: the other plan, the projector's formulas, tokens, ends of responses, full-size shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, interpolate
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from align.errors import UserError
from align.models.load import load_model, load_processor
from align.models.save import save_checkpoint
from align.models.vl360 import QH360_VL_LlamaForCausalLM, QH360VLConfig
from align.models.vl360.modeling import _join_quarters
from align.models.vl360.processing import DEFAULT_SYSTEM, five_crops
from align.models.weights import tensor_table

GOLDEN = Path(__file__).parents[1] / "golden" / "vl360_tiny"
OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
PICTURE = Image.effect_noise((300, 180), 60).convert("RGB")
ASK = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]}]


def write_folder(folder: Path, *, plan: str = "cc", **changes: object) -> Path:
    """The golden folder, for the other plan with a third projector and without `proj_2`; None drops a key."""
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("images", "golden.npz", "cases.json"))
    config = json.loads((folder / "config.json").read_text()) | changes
    tensors = load_file(GOLDEN / "model.safetensors")
    if plan == "sw":
        config["proj_2"] = None
        for name in [name for name in tensors if ".mm_projector_ori." in name]:
            tensors[name.replace("_ori", "")] = 0.5 * tensors[name]
    if plan == "single":
        # What the authors' trainer writes by default.
        config["proj_2"] = False
        tensors = {name.replace("_ori", ""): tensors[name] for name in tensors if ".mm_projector_ctt." not in name}
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept, indent=1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def channel_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(dim=1, keepdim=True) + 1e-5)
    return scaled * weight[:, None, None] + bias[:, None, None]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def reference_block(x: torch.Tensor, t: dict[str, torch.Tensor], b: str) -> torch.Tensor:
    """The published formula of a block, tensor by tensor."""

    def step(x: torch.Tensor, name: str, groups: int = 1, padding: int = 0) -> torch.Tensor:
        maps = conv2d(x, t[f"{b}.{name}.conv.weight"], groups=groups, padding=padding)
        return channel_norm(maps, t[f"{b}.{name}.bn.weight"], t[f"{b}.{name}.bn.bias"])

    inner = silu(step(silu(step(x, "conv1")), "conv2", groups=32, padding=1))
    squeezed = silu(conv2d(inner.mean((2, 3), keepdim=True), t[f"{b}.se.fc1.weight"], t[f"{b}.se.fc1.bias"]))
    gate = 1 / (1 + torch.exp(-conv2d(squeezed, t[f"{b}.se.fc2.weight"], t[f"{b}.se.fc2.bias"])))
    return silu(step(inner * gate, "conv3") + x)


def reference_projection(patches: torch.Tensor, t: dict[str, torch.Tensor], p: str, queries: int = 100) -> torch.Tensor:
    """`(B, L, E)` to `(B, queries, O)`; mean over the cells of an even grid stands for the adaptive pooling."""
    side, width = round(patches.shape[1] ** 0.5), round(queries**0.5)
    table = t[f"{p}.pos_emb"][:, 1:].transpose(1, 2).unflatten(2, (24, 24))
    if side != 24:
        table = interpolate(table, (side, side), mode="bicubic", align_corners=False)
    maps = patches.transpose(1, 2).unflatten(2, (side, side)) + table
    for block in ("b1", "b2"):
        maps = reference_block(maps, t, f"{p}.net.0.{block}")
    bounds = [(row * side // width, -(-(row + 1) * side // width)) for row in range(width)]
    rows = [torch.stack([maps[:, :, a:b, c:d].mean((2, 3)) for c, d in bounds], dim=-1) for a, b in bounds]
    maps = torch.stack(rows, dim=-2)
    for block in ("b1", "b2"):
        maps = reference_block(maps, t, f"{p}.net.2.{block}")
    tokens = maps.flatten(2).transpose(1, 2)
    hidden = silu(tokens @ t[f"{p}.readout.0.weight"].T + t[f"{p}.readout.0.bias"])
    return hidden @ t[f"{p}.readout.2.weight"].T + t[f"{p}.readout.2.bias"]


@pytest.mark.parametrize("plan", ["cc", "sw"])
def test_images_are_projected_by_the_published_formulas(tmp_path, plan):
    folder = write_folder(tmp_path / "policy", plan=plan)
    model, processor = load_model(folder), load_processor(folder)
    tensors = load_file(folder / "model.safetensors")
    inputs = processor.apply_chat_template(ASK, **OPTIONS)
    with torch.no_grad():
        clip = model.model.vision_tower.vision_tower
        patches = clip(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        features = model.model.get_image_features(inputs["pixel_values"], inputs["pictures_per_image"]).pooler_output
    quarters = [patch.unflatten(0, (24, 24)) for patch in patches[:4]]
    if plan == "cc":
        top, bottom = torch.cat(quarters[:2], dim=1), torch.cat(quarters[2:], dim=1)
        details = reference_projection(torch.cat((top, bottom)).flatten(0, 1)[None], tensors, "model.mm_projector_ctt")
    else:
        details = reference_projection(patches[:4], tensors, "model.mm_projector_ctt").flatten(0, 1)[None]
    whole = reference_projection(patches[4:], tensors, "model.mm_projector_ori")
    expected = torch.cat((details[0], whole[0]))
    assert len(expected) == {"cc": 200, "sw": 500}[plan] == processor.num_image_tokens(300, 180)
    torch.testing.assert_close(features[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_other_plan_keeps_its_unused_projector(tmp_path):
    folder = write_folder(tmp_path / "policy", plan="sw")
    model, processor = load_model(folder).train(), load_processor(folder)
    model(**processor.apply_chat_template(ASK, **OPTIONS)).logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    saved = save_checkpoint(model, processor, tmp_path / "saved", code="none")
    before, after = load_file(folder / "model.safetensors"), load_file(saved / "model.safetensors")
    assert set(after) == set(before)
    assert "model.mm_projector.net.0.b1.conv1.conv.weight" in after
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_quarters_are_put_together_as_a_picture():
    """Patches numbered row by row in a picture of 4 x 4, cut into quarters of 2 x 2."""
    picture = torch.arange(16.0).view(4, 4)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2)]
    quarters = torch.stack([picture[r : r + 2, c : c + 2].flatten() for r, c in corners])
    assert _join_quarters(quarters[None, :, :, None])[0, :, 0].tolist() == list(range(16))


def test_every_image_of_the_published_models_has_1152_tokens():
    assert QH360VLConfig(proj_2=True, visual_projector_config={"num_queries": 576}).num_image_tokens == 1152


@pytest.mark.parametrize("plan", ["sw", "single"])
def test_a_single_picture_goes_through_the_third_projector(tmp_path, plan):
    folder = write_folder(tmp_path / "policy", plan=plan)
    settings = {"single_picture": True} if plan == "sw" else {}
    model, processor = load_model(folder), load_processor(folder, default_system=None, **settings)
    inputs = processor.apply_chat_template(ASK, **OPTIONS)
    assert inputs["pictures_per_image"].tolist() == [1]
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert processor.num_image_tokens(300, 180) == (inputs["input_ids"] == processor.image_token_id).sum() == 100
    # CLIPImageProcessor of the padded picture: short side 336, nothing to crop.
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    square = Image.new("RGB", (300, 300), (122, 116, 104))
    square.paste(PICTURE, (0, 60))
    np.testing.assert_allclose(inputs["pixel_values"], clip(square, return_tensors="np")["pixel_values"], atol=1e-6)
    patches = model.model.vision_tower(inputs["pixel_values"])
    tensors = load_file(folder / "model.safetensors")
    expected = reference_projection(patches, tensors, "model.mm_projector")
    images = {name: inputs[name] for name in ("pixel_values", "pictures_per_image")}
    torch.testing.assert_close(
        model.model.get_image_features(**images).pooler_output[0], expected[0], rtol=0, atol=2e-5
    )
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("plan", ["sw", "single"])
def test_the_third_projector_is_trained_where_config_json_says_so_and_saved(tmp_path, plan):
    folder = write_folder(tmp_path / "policy", plan=plan, **({"single_picture": True} if plan == "sw" else {}))
    model, processor = load_model(folder), load_processor(folder)
    assert processor.single_picture
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and "mm_projector" in name}
    assert trained == {name for name in dict(model.named_parameters()) if ".mm_projector." in name}
    saved = save_checkpoint(model, processor, tmp_path / "saved", code="none")
    assert tensor_table(saved).keys() == tensor_table(folder).keys()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, saved))
    assert after == before


def test_pictures_that_no_projector_reads_are_refused(tmp_path):
    with pytest.raises(UserError, match="single_picture"):
        load_processor(GOLDEN, single_picture=True)
    with pytest.raises(UserError, match="single_picture"):
        load_processor(write_folder(tmp_path / "policy", plan="single"), single_picture=False)
    model = load_model(GOLDEN)
    with pytest.raises(ValueError, match="expected 5 pictures per image"):
        model.model.get_image_features(torch.zeros(1, 3, 336, 336), torch.tensor([1]))


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1000, 100), (336, 336)])
def test_images_of_any_size_become_five_crops(size):
    crops = five_crops(Image.new("RGB", size, (9, 99, 200)), 28, pad=True)
    assert [crop.shape for crop in crops] == [(3, 28, 28)] * 5


def test_a_second_image_and_a_video_are_refused():
    processor = load_processor(GOLDEN)
    for content, reason in [
        ([{"type": "image", "image": PICTURE}] * 2, "one image a conversation, found 2"),
        ([{"type": "video", "video": [PICTURE] * 2}], "not videos"),
    ]:
        with pytest.raises(ValueError, match=reason):
            processor.apply_chat_template([{"role": "user", "content": content}], **OPTIONS)


def test_the_end_of_a_turn_ends_a_response():
    model = load_model(GOLDEN)
    assert model.generation_config.eos_token_id == [269, 272]
    processor = load_processor(GOLDEN)
    case = next(case for case in json.loads((GOLDEN / "cases.json").read_text()) if case["name"] == "tiny")
    # The recorded response says <|eot_id|> (272) third and was recorded on beyond it.
    assert case["greedy"][2] == 272
    images = [GOLDEN / path for path in case["images"]]
    inputs = processor.apply_chat_template(case["conversation"], images=images, **OPTIONS)
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said.tolist() == case["greedy"][:3]


def test_a_saved_checkpoint_keeps_the_published_generation_config(tmp_path):
    saved = save_checkpoint(load_model(GOLDEN), load_processor(GOLDEN), tmp_path / "saved")
    assert (saved / "generation_config.json").read_text() == (GOLDEN / "generation_config.json").read_text()


def test_the_system_text_of_the_demo_is_the_default():
    text = load_processor(GOLDEN).apply_chat_template(ASK, add_generation_prompt=True)
    prompt = f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DEFAULT_SYSTEM}<|eot_id|>"
    assert text.startswith(prompt + "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>")
    bare = load_processor(GOLDEN, default_system=None).apply_chat_template(ASK)
    assert bare.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?")


def test_squeezing_instead_of_padding_is_a_setting():
    padded, squeezed = (
        load_processor(GOLDEN, image_aspect_ratio=ratio).apply_chat_template(ASK, **OPTIONS)["pixel_values"]
        for ratio in ("pad", "square")
    )
    assert padded.shape == squeezed.shape
    assert not torch.equal(padded, squeezed)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"visual_projector_config": {"depth": 2}}, "num_queries"),
        ({"visual_projector_config": None}, "num_queries"),
        ({"visual_projector_config": {"num_queries": 99, "encoder_hidden_size": 32}}, "square number"),
        ({"single_picture": True}, "third projector"),
        ({"mm_projector_type": "mlp"}, "c-abs"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size"),
    ],
)
def test_configurations_that_cannot_be_computed_are_refused(tmp_path, changes, reason):
    folder = write_folder(tmp_path / "policy", **changes)
    with pytest.raises(UserError, match=reason):
        load_model(folder)


@pytest.mark.parametrize(
    ("sizes", "num_tensors", "num_parameters"),
    [
        # Llama-3-8B 8,030,261,248; CLIP ViT-L/14-336 303,507,456; twice a projector of 37,399,040.
        ({}, 848, 8_030_261_248 + 303_507_456 + 2 * 37_399_040),
        # Llama-3-70B 70,553,706,496; projectors of 91,933,184.
        (
            {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
            1280,
            70_553_706_496 + 303_507_456 + 2 * 91_933_184,
        ),
    ],
)
def test_full_size_shapes(sizes, num_tensors, num_parameters):
    with torch.device("meta"):
        config = QH360VLConfig(proj_2=True, visual_projector_config={"num_queries": 576}, **sizes)
        model = QH360_VL_LlamaForCausalLM(config)
    parameters = dict(model.named_parameters())
    # Nine tensors per layer and three; 391 of CLIP; two projectors of 83: six blocks of 13, two linears, a table.
    assert num_tensors == 9 * config.num_hidden_layers + 3 + 391 + 2 * (6 * 13 + 4 + 1)
    assert len(parameters) == num_tensors
    assert sum(parameter.numel() for parameter in parameters.values()) == num_parameters
    assert tuple(parameters["model.mm_projector_ctt.pos_emb"].shape) == (1, 577, 1024)
    if not sizes:
        # The published files of 360VL-8B have 16.82 GB in bfloat16.
        assert round(2 * num_parameters / 1e9, 2) == 16.82
