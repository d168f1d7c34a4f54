"""What every family of ours must do, asked of its golden checkpoint: open, save, batch, sample, train, travel."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from align.models.load import load_model, load_processor
from align.models.save import save_checkpoint
from align.models.weights import tensor_table

GOLDENS = Path(__file__).parents[1] / "golden"
FAMILIES = ("llava_ov_original_tiny", "valley25_tiny", "valley_v1_tiny", "vl360_tiny")
RED, BLUE = Image.new("RGB", (90, 60), (200, 30, 30)), Image.new("RGB", (40, 70), (10, 30, 220))
END_OF_TURN = r"<\|im_end\|>|<\|eot_id\|>|\n###"
OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request):
    return GOLDENS / request.param


@pytest.fixture(scope="module")
def model(golden):
    return load_model(golden)


@pytest.fixture(scope="module")
def processor(golden):
    """With few visual tokens an image, where the family lets one choose."""
    settings = {"llava_ov_original_tiny": {"image_aspect_ratio": "pad"}}
    return load_processor(golden, **settings.get(golden.name, {}))


def ask(text, *images):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def conversations(golden):
    """One image, two where the family takes them, none."""
    two = (BLUE,) if golden.name == "vl360_tiny" else (RED, BLUE)
    return [ask("Red?", RED), ask("What is the difference?", *two), ask("Hello")]


def test_an_unchanged_model_is_saved_bit_for_bit_under_the_originals_names(golden, model, processor, tmp_path):
    saved = save_checkpoint(model, processor, tmp_path / "saved")
    assert tensor_table(saved) == tensor_table(golden)
    original, written = load_file(golden / "model.safetensors"), load_file(saved / "model.safetensors")
    assert all(torch.equal(original[name], written[name]) for name in original)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (golden, saved))
    assert "ForCausalLM" in after.pop("auto_map")["AutoModelForImageTextToText"]
    assert after == before
    reopened = load_model(saved).state_dict()
    assert all(torch.equal(tensor, reopened[name]) for name, tensor in model.state_dict().items())


def test_settings_of_the_processor_are_kept(golden, model, tmp_path):
    settings = {"default_system": "Be brief."} | ({} if golden.name == "vl360_tiny" else {"num_video_frames": 5})
    saved = save_checkpoint(model, load_processor(golden, **settings), tmp_path / "saved")
    reopened = load_processor(saved)
    assert {name: getattr(reopened, name) for name in settings} == settings


@pytest.mark.parametrize("name", [*FAMILIES, "valley_eagle_tiny"])
def test_every_trained_parameter_of_a_loaded_checkpoint_gets_a_gradient(name):
    """One that never does stops DDP; loading makes parameters trained that their constructor froze."""
    model, processor = load_model(GOLDENS / name).train(), load_processor(GOLDENS / name)
    inputs = processor.apply_chat_template(ask("Red?", RED), **OPTIONS)
    model(**inputs).logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_keys_without_a_value_change_nothing(processor, conversations):
    """As `datasets` gives them: every part has the keys of all others."""
    empty = {"text": None, "image": None, "video": None, "url": None}
    for conversation in conversations:
        padded = [{**m, "content": [{**empty, **part} for part in m["content"]]} for m in conversation]
        plain, found = (processor.apply_chat_template(asked, **OPTIONS) for asked in (conversation, padded))
        assert plain.keys() == found.keys()
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_an_image_may_be_an_array(processor, conversations):
    as_array = [{**p, "image": np.asarray(p["image"])} if "image" in p else p for p in conversations[0][0]["content"]]
    expected = processor.apply_chat_template(conversations[0], **OPTIONS)
    found = processor.apply_chat_template([{"role": "user", "content": as_array}], **OPTIONS)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_equals_one_by_one(padding_side, model, processor, conversations):
    batch = processor.apply_chat_template(conversations, padding_side=padding_side, **OPTIONS)
    with torch.no_grad():
        together = model(**batch).logits
        for row, conversation in enumerate(conversations):
            alone = model(**processor.apply_chat_template(conversation, **OPTIONS)).logits[0]
            kept = batch["attention_mask"][row].bool()
            # Positions are shifted by the padding, which 360VL's sharp attention notices in the fourth decimal.
            torch.testing.assert_close(together[row][kept], alone, rtol=0, atol=5e-4)


def test_several_samples_of_a_question_are_greedy_copies_at_temperature_zero(model, processor, conversations):
    batch = processor.apply_chat_template(conversations, **OPTIONS)
    once = model.generate(**batch, max_new_tokens=4, do_sample=False)
    beams = model.generate(**batch, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3)
    assert beams.tolist() == [row for row in once.tolist() for _ in range(3)]


def test_generate_without_a_cache_gives_the_same(model, processor, conversations):
    inputs = processor.apply_chat_template(conversations[1], **OPTIONS)
    with_cache, without = (
        model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert with_cache.tolist() == without.tolist()


def test_encoded_images_may_be_given_instead_of_pixels(model, processor, conversations):
    inputs = dict(processor.apply_chat_template(conversations, **OPTIONS))
    with torch.no_grad():
        expected = model(**inputs).logits
        images = {name: inputs.pop(name) for name in model.model.image_inputs}
        features = torch.cat(model.get_image_features(**images).pooler_output)
        torch.testing.assert_close(model(**inputs, image_features=features).logits, expected)


def test_too_few_placeholders_are_refused(model, processor, conversations):
    inputs = processor.apply_chat_template(conversations[0], **OPTIONS)
    ids = inputs["input_ids"].clone()
    first = (ids[0] == processor.image_token_id).nonzero()[0]
    ids[0, first] = 1
    with pytest.raises(ValueError, match="was the sequence truncated"):
        model(**{**inputs, "input_ids": ids})


def test_eager_equals_sdpa_and_a_set_attention_stays_out_of_the_encoder(golden, model, processor, conversations):
    eager = load_model(golden, attn_implementation="eager")
    inputs = processor.apply_chat_template(conversations[1], **OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(eager(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)
    assert eager.model.encoders()[0]._attn_implementation == "eager"


def test_the_collator_of_trl_builds_batches_that_the_model_takes(model, processor):
    pairs = [
        {
            "images": [image],
            "prompt": [{"role": "user", "content": "What is it?"}],
            "chosen": [{"role": "assistant", "content": "A square."}],
            "rejected": [{"role": "assistant", "content": "No"}],
        }
        for image in (RED, BLUE)
    ]
    batch = DataCollatorForVisionPreference(processor)(pairs)
    completions = [
        processor.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch.pop("completion_mask"), strict=True)
    ]
    assert [re.split(END_OF_TURN, text)[0] for text in completions] == ["A square.", "A square.", "No", "No"]
    with torch.no_grad():
        hidden = model.base_model(**batch).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**batch).logits)
    assert hidden.shape[:2] == batch["input_ids"].shape


STANDS_ALONE = """
import json, sys
sys.modules["align"] = None  # any import of it now fails
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, case = sys.argv[1], json.loads(sys.argv[2])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
inputs = processor.apply_chat_template(
    case["conversation"], images=case["images"], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1)
print(json.dumps(tokens[0, inputs["input_ids"].shape[1]:].tolist()))
"""


def test_a_checkpoint_opens_where_this_toolkit_is_not_installed(golden, model, tmp_path):
    settings = {"valley_v1_tiny": {"prompt_style": "original_training", "default_system": None}}
    saved = save_checkpoint(model, load_processor(golden, **settings.get(golden.name, {})), tmp_path / "saved")
    case = json.loads((golden / "cases.json").read_text())[0]
    conversation = case.get("conversation") or [{"role": "user", "content": case.get("question") or case["turns"][0]}]
    if "conversation" not in case and "system" in case:
        conversation.insert(0, {"role": "system", "content": case["system"]})
    asked = {"conversation": conversation, "images": [str(golden / path) for path in case["images"]]}
    (tmp_path / "alone.py").write_text(STANDS_ALONE)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "alone.py", str(saved), json.dumps(asked)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == case["greedy"]
