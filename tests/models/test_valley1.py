"""Valley 1 beyond its golden: pooling, prompts, placeholders, Chinese-Valley, full-size shapes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from trl.trainer.utils import disable_dropout_in_model

from align.errors import UserError
from align.media.video import frame_sampler_of, read_frames
from align.models.families import FAMILIES
from align.models.load import load_model, load_processor
from align.models.open_image import FRAME_KEY
from align.models.save import save_checkpoint
from align.models.valley1 import (
    ChineseValleyConfig,
    LlavaLlamaForCausalLM,
    ValleyLlamaConfig,
    ValleyLlamaForCausalLM,
)
from align.models.valley1.processing import SYSTEMS
from tests.models.goldens import VALLEY1

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_v1_tiny"
OPTIONS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
FRAMES = [Image.new("RGB", (90, 70), (30 * number, 10, 200 - 30 * number)) for number in range(5)]
WIDTH, PATCHES, HEADS = 48, 256, 8
FLAGS = {
    "never read": {"patch_pooling_method": "max"},
    "importance": {"use_patch_importance_pooling": True},
    "delta": {"use_delta_transformer": True},
}
CHINESE = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"} | {
    "mm_vision_tower": "OFA-Sys/chinese-clip-vit-large-patch14"
}


def layer_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """Tensors of an nn.TransformerEncoderLayer of the published sizes (specification of the family, section 5.2)."""
    return {
        f"{prefix}.self_attn.in_proj_weight": (3 * WIDTH, WIDTH),
        f"{prefix}.self_attn.in_proj_bias": (3 * WIDTH,),
        f"{prefix}.self_attn.out_proj.weight": (WIDTH, WIDTH),
        f"{prefix}.self_attn.out_proj.bias": (WIDTH,),
        f"{prefix}.linear1.weight": (2048, WIDTH),
        f"{prefix}.linear1.bias": (2048,),
        f"{prefix}.linear2.weight": (WIDTH, 2048),
        f"{prefix}.linear2.bias": (WIDTH,),
        **{f"{prefix}.norm{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")},
    }


EXTRA_TENSORS = {
    "never read": {},
    "importance": {"model.pooling_layer.weight": (1, WIDTH * PATCHES), "model.pooling_layer.bias": (1,)},
    "delta": {
        "model.position_matrix": (2048, WIDTH),
        **layer_shapes("model.transformer_delta_encoder.layers.0"),
        **layer_shapes("model.transforemr_adding_layer"),
    },
}


def write_folder(folder: Path, changes: dict, extra: dict[str, tuple[int, ...]]) -> Path:
    """The golden folder with other keys of config.json and more tensors, of random numbers."""
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("images", "golden.npz", "cases.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=1))
    tensors, generator = load_file(GOLDEN / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, shape in extra.items():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        tensors[name] = around + 0.2 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def attention(x: torch.Tensor, tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """Self-attention of sequences `(N, T, D)`, written out."""
    packed = x @ tensors[f"{prefix}.in_proj_weight"].T + tensors[f"{prefix}.in_proj_bias"]
    queries, keys, values = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    weights = torch.softmax(queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1]), dim=-1)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    return mixed @ tensors[f"{prefix}.out_proj.weight"].T + tensors[f"{prefix}.out_proj.bias"]


def norm(x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-5)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def reference_pooling(pooling: str, patches: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The published formulas over patches `(T, 256, D)`, loop by loop."""
    if pooling == "never read":
        return patches.mean(dim=0)
    if pooling == "importance":
        weight, bias = tensors["model.pooling_layer.weight"][0], tensors["model.pooling_layer.bias"][0]
        scores = torch.tensor([float(frame.reshape(-1) @ weight + bias) for frame in patches])
        shares = scores.exp() / scores.exp().sum()
        return sum(share * frame for share, frame in zip(shares, patches, strict=True))
    layer = "model.transformer_delta_encoder.layers.0"
    x = (patches + tensors["model.position_matrix"][: len(patches), None]).transpose(0, 1)
    x = norm(x + attention(x, tensors, f"{layer}.self_attn"), tensors, f"{layer}.norm1")
    inner = torch.relu(x @ tensors[f"{layer}.linear1.weight"].T + tensors[f"{layer}.linear1.bias"])
    x = norm(
        x + inner @ tensors[f"{layer}.linear2.weight"].T + tensors[f"{layer}.linear2.bias"], tensors, f"{layer}.norm2"
    )
    return x[:, -1] + patches.mean(dim=0)


@pytest.mark.parametrize("num_frames", [1, 5])
@pytest.mark.parametrize("pooling", FLAGS)
def test_pooling_follows_the_published_formulas(tmp_path, pooling, num_frames):
    folder = write_folder(tmp_path / "policy", FLAGS[pooling], EXTRA_TENSORS[pooling])
    model, tensors = load_model(folder), load_file(folder / "model.safetensors")
    inputs = load_processor(folder).apply_chat_template(
        [{"role": "user", "content": "<video>\nWhat?"}], images=FRAMES[:num_frames], **OPTIONS
    )
    with torch.no_grad():
        hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        projected = hidden @ tensors["model.mm_projector.weight"].T + tensors["model.mm_projector.bias"]
        features = model.model.get_image_features(inputs["pixel_values"], inputs["pictures_per_image"]).pooler_output
    expected = torch.cat((reference_pooling(pooling, projected[:, 1:], tensors), projected[:, 0]))
    assert len(features) == 1
    torch.testing.assert_close(features[0], expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert (
        pooling == "never read" or num_frames == 1 or (features[0][:256] - projected[:, 1:].mean(0)).abs().max() > 1e-2
    )


@pytest.mark.parametrize("pooling", FLAGS)
def test_every_pooling_is_saved_as_it_was(tmp_path, pooling):
    folder = write_folder(tmp_path / "policy", FLAGS[pooling], EXTRA_TENSORS[pooling])
    model = load_model(folder).train()
    inputs = load_processor(folder).apply_chat_template(
        [{"role": "user", "content": "<video>\nWhat?"}], images=FRAMES, **OPTIONS
    )
    model(**inputs).logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    saved = save_checkpoint(model, load_processor(folder), tmp_path / "saved", code="none")
    before, after = load_file(folder / "model.safetensors"), load_file(saved / "model.safetensors")
    assert set(after) == set(before)
    assert set(EXTRA_TENSORS[pooling]) <= set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((saved / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_without_dropout_a_training_model_computes_what_it_computes_otherwise(tmp_path):
    """DPO compares a model in training with itself at rest; dropout that stayed on would be noise in every margin."""
    folder = write_folder(tmp_path / "policy", FLAGS["delta"], EXTRA_TENSORS["delta"])
    model, processor = load_model(folder), load_processor(folder)
    inputs = processor.apply_chat_template([{"role": "user", "content": "<video>\nWhat?"}], images=FRAMES, **OPTIONS)
    with torch.no_grad():
        at_rest = model(**inputs).logits
        model.train()
        assert not torch.allclose(model(**inputs).logits, at_rest, atol=1e-3)
        disable_dropout_in_model(model)
        torch.testing.assert_close(model(**inputs).logits, at_rest, rtol=0, atol=1e-4)


def test_chinese_valley_opens_with_the_other_tower_and_is_saved_as_it_was(tmp_path):
    folder = write_folder(tmp_path / "policy", CHINESE, {})
    model, processor = load_model(folder), load_processor(folder)
    assert type(model) is LlavaLlamaForCausalLM
    assert type(model.model.vision_tower).__name__ == "ChineseCLIPVisionModel"
    assert processor.default_system == SYSTEMS["chinese"]
    inputs = processor.apply_chat_template([{"role": "user", "content": "<image>\nA"}], images=FRAMES[:1], **OPTIONS)
    clip = load_model(GOLDEN)
    with torch.no_grad():
        # The two encoders differ in how they were trained, not in what they compute.
        torch.testing.assert_close(model(**inputs).logits, clip(**inputs).logits, rtol=0, atol=1e-5)
    saved = save_checkpoint(model, processor, tmp_path / "saved", code="none")
    before, after = load_file(folder / "model.safetensors"), load_file(saved / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((saved / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_the_first_llava_under_the_same_architecture_is_refused(tmp_path):
    folder = write_folder(tmp_path / "policy", CHINESE | {"mm_vision_tower": "openai/clip-vit-large-patch14"}, {})
    with pytest.raises(UserError, match="llava-hf"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_delta_transformer": True, "use_patch_importance_pooling": True}, "both true"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size"),
    ],
)
def test_configurations_that_cannot_be_computed_are_refused(tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        load_model(write_folder(tmp_path / "policy", changes, {}))


# name, sizes, tensors, parameters: Llama 2 and CLIP ViT-L/14 with a linear projection,
# and eight tokens added to 32,000.
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
CLIP_L14 = 303_179_776


def llama_parameters(
    vocab_size: int, hidden_size: int, intermediate_size: int, num_hidden_layers: int, **_: int
) -> int:
    layer = 4 * hidden_size**2 + 3 * hidden_size * intermediate_size + 2 * hidden_size
    return num_hidden_layers * layer + hidden_size + 2 * vocab_size * hidden_size


@pytest.mark.parametrize(
    ("model_class", "config_class", "sizes", "vocab_size", "num_tensors"),
    [
        (ValleyLlamaForCausalLM, ValleyLlamaConfig, LLAMA_7B, 32008, 684),
        (ValleyLlamaForCausalLM, ValleyLlamaConfig, LLAMA_13B, 32007, 756),
        (LlavaLlamaForCausalLM, ChineseValleyConfig, LLAMA_13B, 79480, 756),
    ],
)
def test_full_size_shapes(model_class, config_class, sizes, vocab_size, num_tensors):
    with torch.device("meta"):
        model = model_class(config_class(vocab_size=vocab_size, **sizes))
    parameters = dict(model.named_parameters())
    # Nine tensors per layer, embedding, head and last norm; 391 of CLIP; weight and bias of the projection.
    assert num_tensors == 9 * sizes["num_hidden_layers"] + 3 + 391 + 2
    assert len(parameters) == num_tensors
    width = sizes["hidden_size"]
    expected = llama_parameters(vocab_size=vocab_size, **sizes) + CLIP_L14 + 1024 * width + width
    assert sum(parameter.numel() for parameter in parameters.values()) == expected
    assert tuple(parameters["model.mm_projector.weight"].shape) == (width, 1024)
    assert tuple(parameters["model.vision_tower.embeddings.position_embedding.weight"].shape) == (257, 1024)


@pytest.fixture(scope="module")
def processor():
    return load_processor(GOLDEN)


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN)


def ids_of(processor, conversation, **images):
    return processor.apply_chat_template(conversation, **images, **OPTIONS)["input_ids"][0].tolist()


def test_an_answer_is_asked_for_in_the_words_of_the_training_texts(processor):
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(ask, images=FRAMES[:1], add_generation_prompt=True)
    mark = "<im_start><im_patch><im_end><vi_start><vi_frame><vi_end>"
    assert text == f"<s>{SYSTEMS['multimodal_video']}\n\n### Human: {mark}\nWhat?\n### Assistant:"


def test_prompt_and_response_tokenised_apart_are_the_tokens_of_the_whole(processor):
    """Llama's tokenizer begins every text with a space; the response's own must not come on top."""
    ask = [{"role": "user", "content": "What?"}]
    whole = [*ask, {"role": "assistant", "content": "A red shape."}]
    prompt = processor.apply_chat_template(ask, add_generation_prompt=True)
    text = processor.apply_chat_template(whole)
    assert text.startswith(prompt)
    apart = ids_of(processor, ask, add_generation_prompt=True)
    apart += processor.tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
    assert apart == ids_of(processor, whole)
    assert processor.decode(apart).endswith("### Assistant: A red shape.\n###")


def test_all_pictures_of_a_conversation_are_frames_of_one_image(model, processor):
    parts = [{"type": "image", "image": frame} for frame in FRAMES[:3]]
    together = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    apart = [{"role": "user", "content": [parts[0], {"type": "text", "text": "What?"}, *parts[1:]]}]
    as_text = [{"role": "user", "content": "<image>\nWhat?"}]
    first = processor.apply_chat_template(together, **OPTIONS)
    for other in (
        processor.apply_chat_template(apart, **OPTIONS),
        processor.apply_chat_template(as_text, images=FRAMES[:3], **OPTIONS),
        processor.apply_chat_template([{"role": "user", "content": "What?"}], images=FRAMES[:3], **OPTIONS),
    ):
        assert all(torch.equal(first[name], other[name]) for name in first)
    ids = first["input_ids"][0].tolist()
    assert (ids.count(processor.image_token_id), ids.count(processor.video_token_id)) == (256, 3)
    assert first["pictures_per_image"].tolist() == [3]


def test_an_image_named_twice_is_shown_twice(model, processor):
    twice = [{"role": "user", "content": "<image> and again <image>"}]
    inputs = processor.apply_chat_template(twice, images=FRAMES[:2], **OPTIONS)
    assert inputs["pictures_per_image"].tolist() == [2, 2]
    features = model.model.get_image_features(inputs["pixel_values"], inputs["pictures_per_image"]).pooler_output
    assert torch.equal(features[0], features[1])


def test_frames_of_a_video_are_scaled_as_the_original_scales_them(processor):
    picture = Image.effect_noise((300, 180), 60).convert("RGB")
    film = [{"role": "user", "content": [{"type": "video", "video": [picture]}, {"type": "text", "text": "What?"}]}]
    as_video = processor.apply_chat_template(film, **OPTIONS)["pixel_values"][0].numpy()
    scaled = picture.resize((int(256 * 300 / 180), 256), Image.Resampling.BILINEAR)
    left = round((scaled.width - 224) / 2)
    crop = np.asarray(scaled.crop((left, 16, left + 224, 240)), dtype=np.float64).transpose(2, 0, 1) / 255
    mean, std = (
        np.array(v)[:, None, None] for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    np.testing.assert_allclose(as_video, (crop - mean) / std, atol=1e-6)
    assert FRAME_KEY not in picture.info
    text = [{"role": "user", "content": "<image>\nWhat?"}]
    as_picture = processor.apply_chat_template(text, images=[picture], **OPTIONS)["pixel_values"][0].numpy()
    assert np.abs(as_picture - as_video).max() > 0.1


def test_the_demo_style_drops_what_the_original_drops():
    demo = load_processor(GOLDEN, prompt_style="original_demo", default_system="demo")
    turns = [("user", "<image>\nWhat?"), ("assistant", "Red."), ("user", "Sure?")]
    text = demo.apply_chat_template([{"role": role, "content": said} for role, said in turns], images=FRAMES[:1])
    assert text.startswith(f"<s>{SYSTEMS['demo']}\n\n### Human: <im_start>")
    assert text.endswith("<vi_end>\nWhat? \n### Assistent: Red. \n###")


def test_batches_in_the_style_of_trl(processor):
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    texts = [
        processor.apply_chat_template(ask, add_generation_prompt=True),
        processor.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True),
    ]
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "add_special_tokens": False}
    inputs = processor(images=[FRAMES[:2], []], text=texts, **options)
    assert inputs["attention_mask"].sum(dim=1).tolist()[0] == inputs["input_ids"].shape[1]
    assert inputs["attention_mask"][1].tolist()[-1] == 0
    assert inputs["pictures_per_image"].tolist() == [2]


@pytest.mark.parametrize(
    ("content", "images", "reason"),
    [
        ("<image>\nWhat?", [], "0 pictures"),
        ("What is <im_patch>?", FRAMES[:1], "write it differently"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], FRAMES[:2], "more than the conversation has places"),
    ],
)
def test_pictures_and_marks_that_do_not_fit_are_refused(processor, content, images, reason):
    with pytest.raises(ValueError, match=reason):
        processor.apply_chat_template([{"role": "user", "content": content}], images=images, **OPTIONS)


@pytest.mark.parametrize("settings", [{"prompt_style": "vicuna"}, {"prompt_stile": "training"}])
def test_unknown_settings_are_refused(settings):
    with pytest.raises(UserError, match="prompt_style"):
        load_processor(GOLDEN, **settings)


def test_a_tokenizer_without_the_image_tokens_is_refused(tmp_path):
    folder = write_folder(tmp_path / "policy", {}, {})
    text = (folder / "tokenizer.json").read_text().replace("<vi_frame>", "<other>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="<vi_frame>"):
        load_processor(folder)
    model = load_model(folder)
    assert model.config.video_token_id is None
    with pytest.raises(ValueError, match="ids of the image tokens"), torch.no_grad():
        model(
            input_ids=torch.tensor([[5]]),
            pixel_values=torch.zeros(1, 3, 224, 224),
            pictures_per_image=torch.tensor([1]),
        )


def test_frames_and_placeholders_in_another_order_are_refused(model, processor):
    """The original keeps the text's own embeddings there and says nothing."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat?"}], images=FRAMES[:2], **OPTIONS
    )
    ids = inputs["input_ids"].clone()
    places = torch.isin(ids[0], torch.tensor([processor.image_token_id, processor.video_token_id])).nonzero()[:, 0]
    ids[0, places] = ids[0, places.flip(0)]
    with pytest.raises(ValueError, match="first the patches"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match="was the sequence truncated"):
        model(**{**inputs, "pictures_per_image": torch.tensor([1, 1])})


@pytest.mark.parametrize(
    ("said", "cleaned"),
    [
        ("### Assistant: A red shape.\n### Human: Sure?", "A red shape."),
        (" Response: Valley: Red", "Red"),
        ("A red shape.\n###", "A red shape."),
        ("Sharp # and ## stay", "Sharp # and ## stay"),
    ],
)
def test_responses_are_cleaned_as_in_the_original(processor, said, cleaned):
    assert processor.clean_response(said) == cleaned


def test_a_checkpoint_of_valley3_says_what_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ValleyOmni"], "model_type": "valley_omni"}))
    with pytest.raises(UserError, match="audio encoder is not supported"):
        load_model(tmp_path)


def test_the_family_is_found_by_architecture_not_by_model_type():
    assert FAMILIES["ValleyLlamaForCausalLM"].config.model_type == FAMILIES["ValleyQwen2ForCausalLM"].config.model_type


def test_a_copy_elsewhere_gives_the_same(tmp_path):
    """Token ids are read from the folder's own tokenizer: swapped there, they are swapped in the model."""
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN, folder)
    text = (folder / "tokenizer.json").read_text()
    text = text.replace('"<im_patch>"', '"<other>"').replace('"<vi_start>"', '"<im_patch>"')
    (folder / "tokenizer.json").write_text(text.replace('"<other>"', '"<vi_start>"'))
    swapped = load_model(folder)
    assert swapped.config.image_token_id != VALLEY1.model.config.image_token_id
    assert load_processor(folder).image_token_id == swapped.config.image_token_id


def test_a_video_file_gives_the_original_greedy_tokens(tmp_path):
    """The recorded frames as a real file of a lossless codec, read and picked as a user's video would be."""
    case, processor = VALLEY1.cases["video13_file"], VALLEY1.processor("video13_file")
    pictures = [Image.open(GOLDEN / path).convert("RGB") for path in case["images"]]
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "bgr0"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    frames = read_frames(tmp_path / "film.mkv", sampler=frame_sampler_of(processor))
    assert [frame.info[FRAME_KEY] for frame in frames] == case["sampled"]
    asked = {**VALLEY1.ask(case), "images": frames}
    inputs = processor.apply_chat_template(**asked, **OPTIONS)
    expected = VALLEY1.inputs("video13_file")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    tokens = VALLEY1.model.generate(**inputs, max_new_tokens=12, do_sample=False, **VALLEY1.greedy)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy"]
