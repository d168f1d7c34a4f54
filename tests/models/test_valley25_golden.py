"""Valley2.5 against a composition of the published Valley2 code with Qwen3 (tests/golden/valley25_tiny)."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from align.models.load import load_model, load_processor

GOLDEN = Path(__file__).parents[1] / "golden" / "valley25_tiny"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
SENTINEL = -200  # stands for one image in the recorded ids
IGNORED = -100


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


def build_inputs(name):
    case = CASES[name]
    limit = case.get("max_pixels", 16384 * 784)
    black = "black" if case["kind"] == "black_image" else "none"
    processor = load_processor(GOLDEN, max_pixels=limit, max_pixels_of_several=limit, text_only_image=black)
    return processor.apply_chat_template(
        case["conversation"],
        images=[GOLDEN / path for path in case["images"]],
        add_generation_prompt=case["conversation"][-1]["role"] == "user",
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.fixture(scope="module")
def inputs():
    return {name: build_inputs(name) for name in CASES}


def collapse(ids, image_token_id):
    """Every run of placeholders as one sentinel. No two images touch: each stands between its own two tokens."""
    runs = itertools.groupby(ids, key=lambda token: token == image_token_id)
    return list(itertools.chain.from_iterable([SENTINEL] if placeholder else run for placeholder, run in runs))


@pytest.mark.parametrize("name", CASES)
def test_ids_and_grids_equal_the_original(name, model, inputs, golden):
    ids = inputs[name]["input_ids"][0].tolist()
    assert len(ids) == CASES[name]["seq_len"]
    assert ids.count(model.config.image_token_id) == CASES[name]["image_tokens"]
    assert collapse(ids, model.config.image_token_id) == golden[f"{name}/input_ids"].reshape(-1).tolist()
    if CASES[name]["image_tokens"]:
        assert inputs[name]["image_grid_thw"].tolist() == golden[f"{name}/grid"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_the_original(name, inputs, golden):
    if not CASES[name]["image_tokens"]:
        assert "pixel_values" not in inputs[name]
        return
    pixels = inputs[name]["pixel_values"].numpy()
    assert list(pixels.shape) == golden[f"{name}/pixel_shape"].tolist()
    sample = pixels.reshape(-1)[golden[f"{name}/pixel_sample_index"]]
    np.testing.assert_allclose(sample, golden[f"{name}/pixel_sample"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_original(name, model, inputs, golden):
    with torch.no_grad():
        logits = model(**inputs[name]).logits[0].numpy()
    np.testing.assert_allclose(logits[-8:], golden[f"{name}/logits_tail"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[-1], golden[f"{name}/last_logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.mean(axis=0), golden[f"{name}/logits_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_embeddings_equal_the_original(name, model, inputs, golden):
    given = {key: value for key, value in inputs[name].items() if key in model.model.image_inputs}
    with torch.no_grad():
        embeds = model.model.embed(inputs[name]["input_ids"], None, None, None, **given)[0].numpy()
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), golden[f"{name}/embed_norms"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(embeds.mean(axis=0), golden[f"{name}/embed_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_original_greedy_tokens(name, model, inputs):
    # The recording did not stop at the end token.
    tokens = model.generate(**inputs[name], max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert tokens[0, inputs[name]["input_ids"].shape[1] :].tolist() == CASES[name]["greedy"]


def test_the_loss_of_the_original_is_reproduced(model, inputs, golden):
    case = CASES["sft_two_turns"]
    ids = inputs["sft_two_turns"]["input_ids"][0].tolist()
    recorded = iter(golden["sft_two_turns/labels"].reshape(-1).tolist())
    labels, before = [], None
    for token in ids:
        if token == model.config.image_token_id:
            if before != token:
                next(recorded)
            labels.append(IGNORED)
        else:
            labels.append(next(recorded))
        before = token
    assert next(recorded, None) is None
    labels = [IGNORED if label == SENTINEL else label for label in labels]
    with torch.no_grad():
        loss = model(**inputs["sft_two_turns"], labels=torch.tensor([labels])).loss
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)


def test_a_video_is_its_frames_as_images(model):
    case = CASES["video8"]
    processor = load_processor(GOLDEN)
    frames = [GOLDEN / path for path in case["images"]]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": case["conversation"][0]["content"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy"]
