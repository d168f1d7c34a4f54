"""What every family of ours must do, asked of its golden checkpoint: open, save, batch, sample, train, travel."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from align.models.load import load_model, load_processor
from align.models.save import save_checkpoint
from align.models.weights import tensor_table
from tests.models.goldens import GOLDENS, ONEVISION, VALLEY1, VL360
from tests.patience import PATIENCE_S

RED, BLUE = Image.new("RGB", (90, 60), (200, 30, 30)), Image.new("RGB", (40, 70), (10, 30, 220))
END_OF_TURN = r"<\|im_end\|>|<\|eot_id\|>|\n###"
OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module", params=GOLDENS, ids=lambda golden: golden.name)
def golden(request):
    return request.param


@pytest.fixture(scope="module")
def model(golden):
    return load_model(golden.folder)


@pytest.fixture(scope="module")
def processor(golden):
    """With few visual tokens per image, where the family lets one choose."""
    return load_processor(golden.folder, **({"image_aspect_ratio": "pad"} if golden is ONEVISION else {}))


def ask(text, *images):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def conversations(golden):
    """One image, two where the family takes them, none."""
    two = (BLUE,) if golden is VL360 else (RED, BLUE)
    return [ask("Red?", RED), ask("What is the difference?", *two), ask("Hello")]


def test_an_unchanged_model_is_saved_bit_for_bit_under_the_originals_names(golden, model, processor, tmp_path):
    saved = save_checkpoint(model, processor, tmp_path / "saved")
    assert tensor_table(saved) == tensor_table(golden.folder)
    original, written = load_file(golden.folder / "model.safetensors"), load_file(saved / "model.safetensors")
    assert all(torch.equal(original[name], written[name]) for name in original)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (golden.folder, saved))
    assert "ForCausalLM" in after.pop("auto_map")["AutoModelForImageTextToText"]
    assert after == before
    reopened = load_model(saved).state_dict()
    assert all(torch.equal(tensor, reopened[name]) for name, tensor in model.state_dict().items())


def test_settings_of_the_processor_are_kept(golden, model, tmp_path):
    settings = {"default_system": "Be brief."} | ({} if golden is VL360 else {"num_video_frames": 5})
    saved = save_checkpoint(model, load_processor(golden.folder, **settings), tmp_path / "saved")
    reopened = load_processor(saved)
    assert {name: getattr(reopened, name) for name in settings} == settings


def test_every_trained_parameter_of_a_loaded_checkpoint_gets_a_gradient(golden):
    """One that never does stops DDP; loading makes parameters trained that their constructor froze."""
    model, processor = load_model(golden.folder).train(), load_processor(golden.folder)
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
    eager = load_model(golden.folder, attn_implementation="eager")
    inputs = processor.apply_chat_template(conversations[1], **OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(eager(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)
    assert {encoder._attn_implementation for encoder in eager.model.encoders()} == {"eager"}


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
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
for folder, asked, options in json.load(sys.stdin):
    inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=True).apply_chat_template(**asked)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    tokens = model.generate(**inputs, **options)
    print(json.dumps(tokens[0, inputs["input_ids"].shape[1]:].tolist()))
"""


@pytest.fixture(scope="module")
def tokens_of_strangers(tmp_path_factory):
    """What a process without this toolkit answers with every family's saved checkpoint, asked as its first golden."""
    folder, tasks = tmp_path_factory.mktemp("strangers"), []
    for golden in GOLDENS:
        case = next(iter(golden.cases.values()))
        processor = load_processor(golden.folder, **golden.settings(case))
        saved = save_checkpoint(load_model(golden.folder), processor, folder / golden.name)
        paths = [str(golden.folder / path) for path in case["images"]]
        asked = {**golden.ask(case), **OPTIONS, "images": paths, "add_generation_prompt": golden is not VALLEY1}
        tasks.append([str(saved), asked, {"max_new_tokens": 12, "do_sample": False, **golden.greedy}])
    (folder / "alone.py").write_text(STANDS_ALONE)
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "alone.py"],
        cwd=folder,
        env=environment,
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip((golden.name for golden in GOLDENS), map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_checkpoint_opens_where_this_toolkit_is_not_installed(golden, tokens_of_strangers):
    assert tokens_of_strangers[golden.name] == next(iter(golden.cases.values()))["greedy"]
