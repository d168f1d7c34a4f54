"""Trained weights in, a checkpoint folder out, opened again as a stranger would and held against what was trained."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from align.demo.canvas import draw
from align.demo.questions import TASKS, make_task
from align.models.load import load_model, load_processor
from align.models.save import save_checkpoint
from align.models.valley_eagle import ValleyProcessor, ValleyQwen2ForCausalLM
from demo_build.instruct import Log
from demo_build.model import make_config, respond
from demo_build.rows import RowMaker
from demo_build.sizes import EAGLE, SIGLIP

#: Half precision rounds weights; answers may differ where two words were all but equal.
MIN_SAME = 0.97


def open_weights(path: Path, tokenizer: PreTrainedTokenizerFast) -> ValleyQwen2ForCausalLM:
    model = ValleyQwen2ForCausalLM(make_config(tokenizer))
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def export(weights: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, log: Log) -> None:
    """Write the checkpoint in half precision and check that it answers as the trained model does."""
    model = open_weights(weights, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = ValleyProcessor(tokenizer, config=model.config)
    save_checkpoint(model, processor, folder, dtype=torch.float16, code="none")
    _tidy(folder)
    same, num = _same_answers(model, folder, RowMaker(tokenizer))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    log(f"{folder.name}: {size / 1e6:.2f} MB; {same} of {num} greedy answers as before rounding and export")
    assert same >= MIN_SAME * num, "the checkpoint does not answer as the trained model does"


def _tidy(folder: Path) -> None:
    """The encoders' sizes in config.json without what transformers fills in, and no name of the place of building."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(
        json.dumps({**config, "vision_config": SIGLIP, "eagle_vision_config": EAGLE}, indent=2) + "\n", encoding="utf-8"
    )


@torch.no_grad()
def _same_answers(model: ValleyQwen2ForCausalLM, folder: Path, maker: RowMaker, num: int = 60) -> tuple[int, int]:
    """How many greedy answers the exported folder gives, by its own processor and `generate`, as the model does."""
    rng = random.Random(5)
    canvases = [draw(rng, "policy") for _ in range(num)]
    tasks = [make_task(rng, TASKS[i % len(TASKS)], c.digits) for i, c in enumerate(canvases)]
    before = respond(model, maker, np.stack([c.pixels for c in canvases]), [task.question for task in tasks])
    opened = load_model(folder, dtype=torch.float32).eval()
    processor = load_processor(folder)
    same = 0
    for canvas, task, (text,) in zip(canvases, tasks, before, strict=True):
        content = [{"type": "image", "image": canvas.image()}, {"type": "text", "text": task.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        said = opened.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        same += processor.tokenizer.decode(said, skip_special_tokens=True) == text
    return same, num
