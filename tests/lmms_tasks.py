"""A folder of lmms-eval tasks on six drawn pictures of digits, and what stock transformers says to their questions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from align.demo.canvas import draw
from align.demo.data import POLICY
from align.demo.questions import make_task
from align.models.load import load_model, load_processor

CHOICES = ["No, I see one", "Yes, I see a 3", "The digits", "five"]
COMMON: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
LOOKS = """from PIL import Image


def picture(doc):
    return [Image.open(doc["picture"]).convert("RGB")]


def both(doc):
    return [{"role": "user", "content": [
        {"type": "text", "text": "What is in the picture?"},
        {"type": "image", "url": Image.open(doc["picture"])},
        {"type": "image", "url": doc["other"]},
        {"type": "text", "text": "How many digits are there?"},
    ]}]


def sound(doc):
    return ["clip.wav"]
"""


def write_tasks(folder: Path, num_documents: int = 6) -> list[dict[str, Any]]:
    """Tasks named shown, chosen, told (messages of its own), deaf, rounds and lost; returns the documents."""
    rng = random.Random(3)
    (folder / "pictures").mkdir(parents=True)
    documents = []
    for index in range(num_documents):
        canvas = draw(rng, "eval")
        task = make_task(rng, ("list", "count", "has", "describe")[index % 4], canvas.digits)
        path = folder / "pictures" / f"{index}.png"
        canvas.image().save(path)
        # One document says itself where its picture stands.
        question = f"{task.question}<image>" if index == 2 else task.question
        documents.append({"picture": str(path), "question": question, "answer": task.answer, "gold": index % 4})
    for index, document in enumerate(documents):
        document["other"] = documents[index - 1]["picture"]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "looks.py").write_text(LOOKS)
    here = {"dataset_kwargs": {"data_files": {"test": str(data)}}, "doc_to_visual": "!function looks.picture"}
    greedy = {"max_new_tokens": 32, "do_sample": False, "until": [" and"], "image_aspect_ratio": "pad"}
    asks = {"doc_to_text": "{{question}}", "generation_kwargs": greedy}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "What is it?",
        "doc_to_choice": CHOICES,
        "target_delimiter": "",
    }
    acc = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    tasks: dict[str, dict[str, Any]] = {
        "shown": here | asks,
        "chosen": here | choice | {"doc_to_target": "gold", "metric_list": [acc]},
        "told": here | {"doc_to_text": "never asked", "doc_to_messages": "!function looks.both", "generation_kwargs": {"max_new_tokens": 8}},
        "deaf": here | asks | {"doc_to_visual": "!function looks.sound"},
        "rounds": here | asks | {"output_type": "generate_until_multi_round"},
        "lost": here | asks | {"dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}}},
    }  # fmt: skip
    for name, task in tasks.items():
        text = yaml.safe_dump(COMMON | {"task": name} | task, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text.replace("'!function", "!function").replace("picture'", "picture").replace("both'", "both").replace("sound'", "sound"))  # fmt: skip
    return documents


class Stock:
    """The demo's policy through `generate` and `forward` of transformers, one question at a time."""

    def __init__(self) -> None:
        self.model = load_model(POLICY, dtype="float32")
        self.processor = load_processor(POLICY)

    def inputs(self, content: list[Any]) -> dict[str, Any]:
        """Of one user turn: texts, and paths of pictures."""
        parts = [{"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part} for part in content]
        chat = [{"role": "user", "content": parts}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        pictures = [Image.open(part).convert("RGB") for part in content if isinstance(part, Path)]
        return dict(self.processor(text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False))

    @torch.no_grad()
    def says(self, content: list[Any], max_new_tokens: int) -> str:
        inputs = self.inputs(content)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True)

    @torch.no_grad()
    def weighs(self, content: list[Any], continuation: str) -> tuple[list[float], bool]:
        """Log-probabilities of a continuation's tokens, and whether each is the likeliest."""
        inputs = self.inputs(content)
        tokens = self.processor.tokenizer(continuation, add_special_tokens=False, return_tensors="pt").input_ids
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = self.model(**inputs).logits[0, -tokens.shape[1] - 1 : -1].float()
        values = logits.log_softmax(-1).gather(1, tokens[0, :, None])[:, 0]
        return values.tolist(), bool((logits.argmax(-1) == tokens[0]).all())
