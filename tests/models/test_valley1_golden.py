"""Valley 1 against what the authors' published code computed (tests/golden/valley_v1_tiny)."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from align.models.load import load_model, load_processor
from align.models.open_image import FRAME_KEY
from align.video import picker_of, read_frames

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_v1_tiny"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
STYLES = {"train": "original_training", "inference": "original_demo"}
ROLES = {"human": "user", "gpt": "assistant"}
# As many tokens as were recorded, whichever they are.
GREEDY = GenerationConfig(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    model = load_model(GOLDEN)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def processors():
    """By the style of the case."""
    return {name: load_processor(GOLDEN, prompt_style=style, default_system=None) for name, style in STYLES.items()}


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


def pictures_of(case):
    """The pictures of a case, those of a video file as the reader of video files gives them."""
    paths = [case["images"][index] for index in case.get("sampled", range(len(case["images"])))]
    pictures = [Image.open(GOLDEN / path) for path in paths]
    for number, picture in enumerate(pictures):
        if case["preprocess"] == "video":
            picture.info[FRAME_KEY] = number
    return pictures


def conversation_of(case):
    turns = case.get("turns", [["human", case.get("question")]])
    return [{"role": "system", "content": case["system"]}] + [
        {"role": ROLES[who], "content": text} for who, text in turns
    ]


def build_inputs(processors, *names):
    """Model inputs of one case, or of several of one style as a batch."""
    cases = [CASES[name] for name in names]
    processor = processors[cases[0]["prompt_style"]]
    conversations, images = [conversation_of(case) for case in cases], [pictures_of(case) for case in cases]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if len(names) == 1:
        return processor.apply_chat_template(conversations[0], images=images[0], **options)
    return processor.apply_chat_template(conversations, images=images, padding_side="left", **options)


@pytest.mark.parametrize("name", CASES)
def test_ids_equal_the_original(name, processors, golden):
    inputs = build_inputs(processors, name)
    assert inputs["input_ids"][0].tolist() == golden[f"{name}/input_ids"].reshape(-1).tolist()
    assert inputs["input_ids"].shape[1] == CASES[name]["seq_len"]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["images"]])
def test_pixels_equal_the_original(name, processors, golden):
    pixels = build_inputs(processors, name)["pixel_values"].numpy()
    assert list(pixels.shape[-3:]) == golden[f"{name}/pixel_shape"].tolist()[-3:]
    assert pixels.shape[0] == int(golden[f"{name}/frames"])
    index, expected = golden[f"{name}/pixel_sample_index"], golden[f"{name}/pixel_sample"]
    np.testing.assert_allclose(pixels.reshape(-1)[index], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_original(name, model, processors, golden):
    with torch.no_grad():
        logits = model(**build_inputs(processors, name)).logits[0].numpy()
    np.testing.assert_allclose(logits[-8:], golden[f"{name}/logits_tail"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[-1], golden[f"{name}/last_logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.mean(axis=0), golden[f"{name}/logits_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_what_enters_the_decoder_equals_the_original(name, model, processors, golden):
    inputs = build_inputs(processors, name)
    inputs.pop("attention_mask")
    with torch.no_grad():
        embeds = model.model.embed(inputs.pop("input_ids"), None, None, None, **inputs)[0]
    np.testing.assert_allclose(embeds.norm(dim=-1), golden[f"{name}/embed_norms"].reshape(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_original_greedy_tokens(name, model, processors):
    inputs = build_inputs(processors, name)
    tokens = model.generate(**inputs, generation_config=GREEDY)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == CASES[name]["greedy"]


@pytest.mark.parametrize("style", STYLES)
def test_a_batch_of_all_cases_generates_the_original_greedy_tokens(style, model, processors):
    names = [name for name in CASES if CASES[name]["prompt_style"] == style]
    assert len(names) > 1
    inputs = build_inputs(processors, *names)
    tokens = model.generate(**inputs, generation_config=GREEDY)
    assert tokens[:, inputs["input_ids"].shape[1] :].tolist() == [CASES[name]["greedy"] for name in names]


def test_the_loss_equals_the_original(model, processors, golden):
    inputs = build_inputs(processors, "sft_two_turns")
    labels = torch.from_numpy(golden["sft_two_turns/labels"]).reshape(1, -1)
    with torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    assert float(loss) == pytest.approx(CASES["sft_two_turns"]["loss"], abs=1e-5)


def test_rendered_text_equals_the_original(processors):
    for case in CASES.values():
        text = processors[case["prompt_style"]].apply_chat_template(conversation_of(case), images=pictures_of(case))
        expected = case["prompt"].replace("<im_patch>*256", "<im_patch>").replace("<vi_frame>*8", "<vi_frame>")
        assert text.removeprefix("<s>") == expected.replace("<vi_frame><vi_frame>", "<vi_frame>")


def test_a_copy_elsewhere_gives_the_same(tmp_path, model, processors):
    """Token ids are read from the folder's own tokenizer: swapped there, they are swapped in the model."""
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN, folder)
    text = (folder / "tokenizer.json").read_text()
    text = text.replace('"<im_patch>"', '"<other>"').replace('"<vi_start>"', '"<im_patch>"')
    (folder / "tokenizer.json").write_text(text.replace('"<other>"', '"<vi_start>"'))
    swapped = load_model(folder)
    assert swapped.config.image_token_id != model.config.image_token_id
    assert load_processor(folder).image_token_id == swapped.config.image_token_id


def test_a_video_file_gives_the_original_greedy_tokens(tmp_path, model, processors):
    """The recorded frames as a real file of a lossless codec, read and picked as a user's video would be."""
    case, processor = CASES["video13_file"], processors["inference"]
    pictures = [Image.open(GOLDEN / path).convert("RGB") for path in case["images"]]
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "bgr0"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    frames = read_frames(tmp_path / "film.mkv", picker=picker_of(processor))
    assert [frame.info[FRAME_KEY] for frame in frames] == case["sampled"]
    inputs = processor.apply_chat_template(
        conversation_of(case), images=frames, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = build_inputs(processors, "video13_file")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    tokens = model.generate(**inputs, generation_config=GREEDY)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy"]
