"""Valley-Eagle against what the authors' published code computed (tests/golden/valley_eagle_tiny)."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import align.models  # noqa: F401  (registers the family)

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_eagle_tiny"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
SENTINEL = -200  # stands for one image in the recorded ids


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(GOLDEN).eval()


@pytest.fixture(scope="module")
def processor():
    """With the conventions the goldens were recorded under."""
    return AutoProcessor.from_pretrained(GOLDEN, max_pixels=1280 * 28 * 28, text_only_image="black")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


def build_inputs(processor, *names):
    """Model inputs of one case, or of several as a batch."""
    cases = [CASES[name] for name in names]
    conversations = [case["conversation"] for case in cases]
    images = [[GOLDEN / path for path in case["images"]] for case in cases]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if len(names) == 1:
        return processor.apply_chat_template(conversations[0], images=images[0], **options)
    return processor.apply_chat_template(conversations, images=images, **options)


def collapse(ids, image_token_id):
    """Every run of placeholders as one sentinel. No two images touch: each stands between its own two tokens."""
    runs = itertools.groupby(ids, key=lambda token: token == image_token_id)
    return list(itertools.chain.from_iterable([SENTINEL] if placeholder else run for placeholder, run in runs))


@pytest.mark.parametrize("name", CASES)
def test_inputs_equal_the_original(name, processor, golden):
    inputs = build_inputs(processor, name)
    ids = inputs["input_ids"][0].tolist()
    assert len(ids) == CASES[name]["seq_len"]
    assert collapse(ids, processor.image_token_id) == golden[f"{name}/input_ids"].reshape(-1).tolist()
    assert inputs["tiles_per_image"].tolist() == golden[f"{name}/tiles"].reshape(-1).tolist()
    assert inputs["image_grid_thw"].tolist() == golden[f"{name}/grid"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_rendered_text_equals_the_original(name, processor):
    case = CASES[name]
    images = [GOLDEN / path for path in case["images"]]
    text = processor.apply_chat_template(case["conversation"], images=images, add_generation_prompt=True)
    assert text.replace("<image>", "") == case["text"]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_original(name, model, processor, golden):
    with torch.no_grad():
        logits = model(**build_inputs(processor, name)).logits[0].numpy()
    np.testing.assert_allclose(logits[-8:], golden[f"{name}/logits_tail"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[-1], golden[f"{name}/last_logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.mean(axis=0), golden[f"{name}/logits_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_original_greedy_tokens(name, model, processor):
    inputs = build_inputs(processor, name)
    tokens = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == CASES[name]["greedy"]


def test_a_batch_of_all_cases_generates_the_original_greedy_tokens(model, processor):
    inputs = build_inputs(processor, *CASES)
    tokens = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert tokens[:, inputs["input_ids"].shape[1] :].tolist() == [case["greedy"] for case in CASES.values()]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_equals_one_by_one(padding_side, model, processor):
    names = ["square_small", "tall", "two", "text_only", "tiny", "odd"]
    conversations = [CASES[name]["conversation"] for name in names]
    images = [[GOLDEN / path for path in CASES[name]["images"]] for name in names]
    batch = processor.apply_chat_template(
        conversations,
        images=images,
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
            torch.testing.assert_close(together[row][kept], alone, rtol=0, atol=1e-5)


def test_eager_equals_sdpa(model, processor):
    eager = AutoModelForImageTextToText.from_pretrained(GOLDEN, attn_implementation="eager").eval()
    towers = (eager.config.vision_config, eager.config.eagle_vision_config)
    assert {config._attn_implementation for config in (eager.config, *towers)} == {"eager"}
    assert model.config._attn_implementation == "sdpa"
    inputs = build_inputs(processor, "odd")
    with torch.no_grad():
        torch.testing.assert_close(eager(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
