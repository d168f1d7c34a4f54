"""A round whose samples were written by hand, and tiny critics whose behaviour is built in, for tests of scoring."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from align.config import Config, load_config
from align.records import Question, Response, Samples, read_jsonl, write_jsonl
from align.run.folder import RunDir
from align.stages.score import run_score
from reward.judgement import Judgement
from tests.tiny_models import byte_tokenizer, llava_onevision, llava_onevision_processor, random_image

NUM_QUESTIONS = 4
TEXTS = ["A red bus.", "It is 7.", "Two dogs run on grass.", "No."]


def write_round(folder: Path, *, answers: bool = False, num_questions: int = NUM_QUESTIONS) -> None:
    """Images of one size, questions, and complete samples of round 1 in the run folder of `config_of`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num_questions):
        image = f"images/{index}.png"
        random_image(index).save(folder / image)
        question = Question(id=f"q{index}", question="What is it?", images=[image], answer="7" if answers else None)
        texts = [f"{text[:-1]}, {index}." if text != "It is 7." else text for text in TEXTS]
        responses = [Response(text=text, num_tokens=len(text)) for text in texts]
        lines.append(Samples(id=question.id, question=question, responses=responses, seed=index))
    write_jsonl(folder / "questions.jsonl", [line.question for line in lines])
    this = RunDir(folder / "runs" / "run").round(1)
    this.path.mkdir(parents=True, exist_ok=True)
    write_jsonl(this.samples, lines)
    this.manifest.begin("sample", settings={}, inputs={})
    this.manifest.finish("sample", outputs=[this.samples], counts={}, seconds=0.0)


def config_of(folder: Path, **settings: Any) -> Config:
    values = {"policy": "./none", "questions": "questions.jsonl", "model": {"dtype": "float32"}} | settings
    (folder / "align.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "align.yaml")


def score(folder: Path, **critic: Any) -> dict[str, Any]:
    """Score round 1 with these critic settings; the counts of the stage."""
    run_score(config_of(folder, critic=critic), 1)
    return score_counts(folder)


def score_counts(folder: Path) -> dict[str, Any]:
    stage = RunDir(folder / "runs" / "run").round(1).manifest.stage("score")
    assert stage is not None
    return stage.counts


def score_lines(folder: Path) -> list[Judgement]:
    return read_jsonl(RunDir(folder / "runs" / "run").round(1).scores, Judgement)


def save_always_first(folder: Path) -> Path:
    """A critic whose layers add nothing and whose head answers each last token with the next letter of "first"."""
    model = llava_onevision(3)
    language, tokenizer = model.model.language_model, byte_tokenizer()
    spoken = [*tokenizer.encode("\nfirst"), tokenizer.eos_token_id]
    with torch.no_grad():
        for layer in language.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in pairwise(spoken):
            model.lm_head.weight[following] = language.norm(language.embed_tokens.weight[token])
    return _save(model, folder)


def save_blind(folder: Path) -> Path:
    """A random critic whose projector gives zeros: whatever the image shows, the language model reads the same."""
    return _save(_random_critic(image_weight=0.0), folder)


def save_seeing(folder: Path) -> Path:
    """The same critic with a projector that speaks loudly."""
    return _save(_random_critic(image_weight=20.0), folder)


def _random_critic(image_weight: float) -> Any:
    """A random model in which attention, and pixels more than their positions, count for much."""
    model = llava_onevision(1)
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if "position" in name:
                parameter.mul_(0.1)
            elif "patch_embedding.weight" in name:
                parameter.mul_(5)
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(4)
        model.model.multi_modal_projector.linear_2.weight.mul_(image_weight)
        model.model.multi_modal_projector.linear_2.bias.zero_()
    return model


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    llava_onevision_processor().save_pretrained(folder)
    return folder
