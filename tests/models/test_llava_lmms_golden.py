"""LLaVA-OneVision in its original format against what the authors' code computed (tests/golden/llava_ov_original_tiny)."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from align.models.load import load_model, load_processor

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_ov_original_tiny"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
SENTINEL = -200  # stands for one image or video in the recorded ids


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def processors():
    """By `image_aspect_ratio`, which some cases set otherwise than config.json."""
    return {ratio: load_processor(GOLDEN, image_aspect_ratio=ratio) for ratio in ("anyres_max_9", "pad")}


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


def build_inputs(processors, *names):
    """Model inputs of one case, or of several as a batch; all of one mode."""
    cases = [CASES[name] for name in names]
    processor = processors[cases[0]["image_aspect_ratio"] or "anyres_max_9"]
    conversations = [
        [
            {"role": role, "content": turn.replace("<image>", "<video>") if case["kind"] == "video" else turn}
            for role, turn in zip(itertools.cycle(["user", "assistant"]), case["turns"], strict=False)
        ]
        for case in cases
    ]
    paths = [[GOLDEN / path for path in case["images"]] for case in cases]
    images = [[] if case["kind"] == "video" else own for case, own in zip(cases, paths, strict=True)]
    videos = [[own] if case["kind"] == "video" else [] for case, own in zip(cases, paths, strict=True)]
    return processor.apply_chat_template(
        conversations,
        images=images,
        videos=videos,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.fixture(scope="module")
def inputs(processors):
    return {name: build_inputs(processors, name) for name in CASES}


def collapse(ids, image_token_id, lengths):
    """Every image's run of placeholders as one sentinel."""
    collapsed, position, rest = [], 0, iter(lengths)
    while position < len(ids):
        if ids[position] == image_token_id:
            length = next(rest)
            assert set(ids[position : position + length]) == {image_token_id}
            collapsed.append(SENTINEL)
            position += length
        else:
            collapsed.append(ids[position])
            position += 1
    assert next(rest, None) is None
    return collapsed


@pytest.mark.parametrize("name", CASES)
def test_ids_and_counts_equal_the_original(name, inputs, processors, golden):
    case = CASES[name]
    ids = inputs[name]["input_ids"][0].tolist()
    image_token_id = processors["pad"].image_token_id
    assert ids.count(image_token_id) == case["image_tokens"]
    assert len(ids) == case["seq_len"]
    processor = processors[case["image_aspect_ratio"] or "anyres_max_9"]
    if case["kind"] == "video":
        lengths = [case["image_tokens"]]
    else:
        lengths = [processor.num_image_tokens(*size) for size in case["image_sizes"]]
    assert collapse(ids, image_token_id, lengths) == golden[f"{name}/input_ids"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_the_original(name, inputs, golden):
    if not CASES[name]["images"]:
        assert "pixel_values" not in inputs[name]
        return
    pixels = inputs[name]["pixel_values"].numpy()
    assert list(pixels.shape) == golden[f"{name}/pixel_shape"].tolist()
    sample = pixels.reshape(-1)[golden[f"{name}/pixel_sample_index"]]
    np.testing.assert_allclose(sample, golden[f"{name}/pixel_sample"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(pixels.mean(axis=(1, 2, 3)), golden[f"{name}/pixel_mean"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pixels.std(axis=(1, 2, 3)), golden[f"{name}/pixel_std"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_original(name, model, inputs, golden):
    with torch.no_grad():
        logits = model(**inputs[name]).logits[0].numpy()
    np.testing.assert_allclose(logits[-8:], golden[f"{name}/logits_tail"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[-1], golden[f"{name}/last_logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.mean(axis=0), golden[f"{name}/logits_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_embeddings_equal_the_original(name, model, inputs, golden):
    """Localises a wrong splice, newline or order, which logits might blur."""
    given = {key: value for key, value in inputs[name].items() if key in model.model.image_inputs}
    with torch.no_grad():
        embeds = model.model.embed(inputs[name]["input_ids"], None, None, None, **given)[0].numpy()
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), golden[f"{name}/embed_norms"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(embeds.mean(axis=0), golden[f"{name}/embed_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_original_greedy_tokens(name, model, inputs):
    tokens = model.generate(**inputs[name], max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert tokens[0, inputs[name]["input_ids"].shape[1] :].tolist() == CASES[name]["greedy"]


def test_a_batch_generates_the_original_greedy_tokens(model, processors):
    names = ["square_small", "unpad_truncation", "multi_anyres", "video8", "text_only"]
    batch = build_inputs(processors, *names)
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert tokens[:, batch["input_ids"].shape[1] :].tolist() == [CASES[name]["greedy"] for name in names]


def test_the_rendered_text_is_the_originals_prompt(processors):
    case = CASES["odd"]
    content = [{"type": "image"}, {"type": "text", "text": case["turns"][0].removeprefix("<image>\n")}]
    text = processors["pad"].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == case["prompt"]
