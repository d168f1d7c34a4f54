"""360VL against what the authors' published code computed (tests/golden/vl360_tiny)."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from align.models.load import load_model, load_processor

GOLDEN = Path(__file__).parents[1] / "golden" / "vl360_tiny"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
SENTINEL = -200  # stands for the image in the recorded ids
# As many tokens as were recorded, whichever they are.
GREEDY = GenerationConfig(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=269)


@pytest.fixture(scope="module")
def model():
    model = load_model(GOLDEN)
    model.generation_config = GenerationConfig(pad_token_id=269)
    return model


@pytest.fixture(scope="module")
def processor():
    return load_processor(GOLDEN)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


def build_inputs(processor, *names):
    """Model inputs of one case, or of several as a batch."""
    conversations = [CASES[name]["conversation"] for name in names]
    images = [[GOLDEN / path for path in CASES[name]["images"]] for name in names]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if len(names) == 1:
        return processor.apply_chat_template(conversations[0], images=images[0], **options)
    return processor.apply_chat_template(conversations, images=images, **options)


def collapse(ids, image_token_id):
    """A run of placeholders as one sentinel."""
    runs = itertools.groupby(ids, key=lambda token: token == image_token_id)
    return list(itertools.chain.from_iterable([SENTINEL] if placeholder else run for placeholder, run in runs))


@pytest.mark.parametrize("name", CASES)
def test_ids_equal_the_original(name, processor, golden):
    ids = build_inputs(processor, name)["input_ids"][0].tolist()
    assert len(ids) == CASES[name]["seq_len"]
    assert ids.count(processor.image_token_id) == CASES[name]["image_tokens"]
    assert collapse(ids, processor.image_token_id) == golden[f"{name}/input_ids"].reshape(-1).tolist()


@pytest.mark.parametrize("name", CASES)
def test_rendered_text_equals_the_original(name, processor):
    case = CASES[name]
    images = [GOLDEN / path for path in case["images"]]
    text = processor.apply_chat_template(case["conversation"], images=images, add_generation_prompt=True)
    assert text.replace("<image>", "<|reserved_special_token_44|>") == case["prompt"]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["images"]])
def test_pixels_equal_the_original(name, processor, golden):
    pixels = build_inputs(processor, name)["pixel_values"].numpy()
    assert pixels.size == np.prod(golden[f"{name}/pixel_shape"])
    assert list(pixels.shape) == golden[f"{name}/pixel_shape"].tolist()[-4:]
    index, expected = golden[f"{name}/pixel_sample_index"], golden[f"{name}/pixel_sample"]
    np.testing.assert_allclose(pixels.reshape(-1)[index], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_original(name, model, processor, golden):
    with torch.no_grad():
        logits = model(**build_inputs(processor, name)).logits[0].numpy()
    np.testing.assert_allclose(logits[-8:], golden[f"{name}/logits_tail"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[-1], golden[f"{name}/last_logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.mean(axis=0), golden[f"{name}/logits_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_what_enters_the_decoder_equals_the_original(name, model, processor, golden):
    inputs = build_inputs(processor, name)
    inputs.pop("attention_mask")
    with torch.no_grad():
        embeds = model.model.embed(inputs.pop("input_ids"), None, None, None, **inputs)[0]
    np.testing.assert_allclose(embeds.norm(dim=-1), golden[f"{name}/embed_norms"].reshape(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_original_greedy_tokens(name, model, processor):
    inputs = build_inputs(processor, name)
    tokens = model.generate(**inputs, generation_config=GREEDY)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == CASES[name]["greedy"]


def test_a_batch_of_all_cases_generates_the_original_greedy_tokens(model, processor):
    inputs = build_inputs(processor, *CASES)
    tokens = model.generate(**inputs, generation_config=GREEDY)
    assert tokens[:, inputs["input_ids"].shape[1] :].tolist() == [case["greedy"] for case in CASES.values()]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_equals_one_by_one(padding_side, model, processor):
    names = ["wide", "text_only", "tiny"]
    batch = processor.apply_chat_template(
        [CASES[name]["conversation"] for name in names],
        images=[[GOLDEN / path for path in CASES[name]["images"]] for name in names],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding_side=padding_side,
    )
    with torch.no_grad():
        together = model(**batch).logits
        for row, name in enumerate(names):
            alone = model(**build_inputs(processor, name)).logits[0]
            kept = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][kept], alone, rtol=0, atol=1e-4)
