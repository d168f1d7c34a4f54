"""What TRL's DPOTrainer asks of a model and a processor, asked of Valley-Eagle."""

import torch
from PIL import Image
from transformers import GenerationMixin, PreTrainedModel, ProcessorMixin
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
