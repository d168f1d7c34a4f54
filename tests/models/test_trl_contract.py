"""What TRL's DPOTrainer asks of a model and a processor, asked of Valley-Eagle."""

import math

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import GenerationMixin, PreTrainedModel, ProcessorMixin
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.models import tiny_valley


def pair(image, prompt, chosen, rejected):
    return {
        "images": [image] if image is not None else [],
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def test_the_collator_of_trl_builds_batches_that_the_model_takes():
    model, processor = tiny_valley.model(), tiny_valley.processor()
    assert isinstance(processor, ProcessorMixin)
    image = Image.new("RGB", (300, 180), (200, 30, 30))
    examples = [
        pair(image, "what is this", "a cat", "a red dog"),
        pair(None, "what is a cat", "one", "two dog"),
        pair(Image.new("RGB", (50, 50)), "is this red", "this is blue", "red"),
    ]
    batch = DataCollatorForVisionPreference(processor)(examples)
    assert batch["input_ids"].shape[0] == 6
    assert len(batch["tiles_per_image"]) == 4
    completions = [
        processor.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert [text.replace("<|im_end|>", "").strip() for text in completions] == [
        "a cat",
        "one",
        "this is blue",
        "a red dog",
        "two dog",
        "red",
    ]
    batch = {name: tensor for name, tensor in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        logits = model(**batch).logits
        hidden = model.base_model(**batch).last_hidden_state
    assert hidden.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)


def test_the_model_is_what_trl_expects():
    model = tiny_valley.model()
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, GenerationMixin)
    assert getattr(model, model.base_model_prefix) is model.base_model
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)


def test_trl_trains_on_parts_that_a_dataset_has_given_empty_keys(tmp_path):
    """A struct column gives every part the keys of all others: an image part has a text of None."""
    words = (("a cat", "a red dog"), ("this is blue", "red"))
    examples = [
        {
            "images": [Image.new("RGB", (60 + 50 * number, 40), (200, 30, 30))],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
        }
        for number, (chosen, rejected) in enumerate(words)
    ]
    dataset = Dataset.from_list(examples)
    assert dataset[0]["prompt"][0]["content"][0] == {"type": "image", "text": None}
    processor = tiny_valley.processor()
    for row, example in zip(dataset, examples, strict=True):
        with_empty_keys, plain = (
            processor.apply_chat_template(one["prompt"], images=one["images"]) for one in (row, example)
        )
        assert with_empty_keys == plain
    args = DPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, max_length=None, report_to="none", use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = tiny_valley.model()
    trainer = DPOTrainer(
        model, ref_model=tiny_valley.model(), args=args, train_dataset=dataset, processing_class=processor
    )
    # Policy and reference are the same before the first step: -log(sigmoid(0)).
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)
