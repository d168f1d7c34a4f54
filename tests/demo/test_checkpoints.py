"""What is shipped: a policy that sees but answers badly, and a critic that can tell."""

import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import align.models  # noqa: F401  (registers Valley-Eagle with the Auto classes)
from align.demo.canvas import Canvas, draw
from align.demo.data import CRITIC, CRITIC_PROMPT, POLICY
from align.demo.questions import TASKS, Task, hallucinates, is_exact, make_task, say
from align.engines.base import SampleRequest, SamplingSettings
from align.engines.local import LocalEngine
from align.models.load import load_model, load_processor
from align.models.save import save_checkpoint
from reward.critics import Item
from reward.critics.pairwise import PairwiseCritic
from reward.reliability import measure

pytest.importorskip("sklearn")
MAX_BYTES = 8_000_000


@cache
def engine(folder: Path) -> LocalEngine:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return LocalEngine(model, AutoProcessor.from_pretrained(folder))


def held_out(number: int) -> list[tuple[Canvas, Task]]:
    rng = random.Random(11)
    canvases = [draw(rng, "eval") for _ in range(number)]
    return [(canvas, make_task(rng, TASKS[i % len(TASKS)], canvas.digits)) for i, canvas in enumerate(canvases)]


@cache
def greedy_answers(number: int) -> dict[str, str]:
    requests = [
        SampleRequest(
            id=str(index),
            messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.question}]}],
            images=(canvas.image().convert("RGB"),),
            num_samples=1,
            seed=0,
        )
        for index, (canvas, task) in enumerate(held_out(number))
    ]
    found: dict[str, str] = {}
    engine(POLICY).sample(
        requests,
        SamplingSettings(temperature=0.0, max_new_tokens=24),
        lambda result: found.update({result.id: result.texts[0]}),
    )
    return found


@pytest.mark.parametrize("folder", [POLICY, CRITIC], ids=lambda folder: folder.name)
def test_a_shipped_checkpoint_that_is_opened_and_saved_is_the_same_to_the_byte(folder, tmp_path):
    saved = save_checkpoint(load_model(folder), load_processor(folder), tmp_path / "saved", code="none")
    shipped, written = ({path.name: path.read_bytes() for path in of.iterdir()} for of in (folder, saved))
    assert written == shipped


@pytest.mark.parametrize("folder", [POLICY, CRITIC], ids=lambda folder: folder.name)
def test_a_shipped_checkpoint_has_every_key_that_an_export_writes_today(folder, tmp_path):
    model, processor = load_model(folder), load_processor(folder)
    model.config._name_or_path = ""
    saved = save_checkpoint(model, processor, tmp_path / "saved", code="none")
    for shipped in folder.glob("*.json"):
        now, then = (json.loads(path.read_text()) for path in (saved / shipped.name, shipped))
        # Of a model that was opened transformers writes its type twice.
        assert now.keys() - {"dtype"} == then.keys(), shipped.name
    assert {path.name for path in saved.iterdir()} == {path.name for path in folder.iterdir()}


def test_both_checkpoints_and_all_beside_them_stay_under_eight_megabytes():
    sizes = [path.stat().st_size for folder in (POLICY, CRITIC) for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) < MAX_BYTES


@pytest.mark.parametrize("folder", [POLICY, CRITIC], ids=["policy", "critic"])
def test_a_checkpoint_is_a_valley_eagle_with_both_encoders_in_half_precision(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["ValleyQwen2ForCausalLM"]
    assert config["eagle_vision_tower"]
    assert config["torch_dtype"] == "float16"
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert {str(tensors.get_tensor(name).dtype) for name in names} == {"torch.float16"}
    for part in ("vision_tower.vision_tower.vision_model.encoder", "qwen2vl_vision_tower.blocks", "mm_projector.conv"):
        assert any(name.startswith(f"model.{part}") for name in names), part


@pytest.mark.parametrize("folder", [POLICY, CRITIC], ids=["policy", "critic"])
def test_every_sentence_of_the_demo_survives_the_tokenizer(folder):
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    for _, task in held_out(200):
        for text in (task.question, task.answer):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_a_picture_is_seen_as_thumbnail_and_tile_and_by_the_second_encoder():
    processor = AutoProcessor.from_pretrained(POLICY)
    canvas, task = held_out(1)[0]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[[canvas.image()]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 112, 112)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16 + 16 + 16


def test_the_policy_sees_but_answers_badly():
    cases, answers = held_out(100), greedy_answers(100)
    exact = [is_exact(task, answers[str(index)]) for index, (_, task) in enumerate(cases)]
    invented = [hallucinates(task, answers[str(index)]) for index, (_, task) in enumerate(cases)]
    assert 0.2 < sum(exact) / len(exact) < 0.75
    assert sum(invented) / len(invented) > 0.15


def test_the_critic_finds_the_right_answer_on_pictures_nobody_trained_on():
    cases, answers = held_out(100), greedy_answers(100)
    items = [
        Item(str(index), task.question, (canvas.image().convert("RGB"),), (task.answer, answers[str(index)]))
        for index, (canvas, task) in enumerate(cases)
        if not is_exact(task, answers[str(index)])
    ]
    judgements = PairwiseCritic(judge_model=engine(CRITIC), prompt=CRITIC_PROMPT, soft=True).judge(items)
    right = [judgement.rewards[0] > judgement.rewards[1] for judgement in judgements]
    assert len(right) > 20
    assert sum(right) / len(right) > 0.8


def with_one_slip(task: Task, rng: random.Random) -> str:
    """A wrong response: one digit for another, one too many, a smaller digit of the picture for the largest, or no
    for yes."""
    absent = rng.choice([digit for digit in range(10) if digit not in task.digits and digit != task.asked])
    if task.kind == "has":
        return say(task, task.digits, present=task.asked not in task.digits)
    if task.kind == "count":
        return say(task, task.digits, number=len(task.digits) + 1)
    if task.kind == "largest":
        return say(task, [min(task.digits) if min(task.digits) < max(task.digits) else absent])
    return say(task, (*task.digits[:-1], absent))


def test_in_every_task_the_critic_prefers_the_right_answer_to_one_with_a_slip():
    rng = random.Random(5)
    cases = held_out(100)
    items = [
        Item(str(index), task.question, (canvas.image().convert("RGB"),), (task.answer, with_one_slip(task, rng)))
        for index, (canvas, task) in enumerate(cases)
    ]
    judgements = PairwiseCritic(judge_model=engine(CRITIC), prompt=CRITIC_PROMPT, soft=True).judge(items)
    right: dict[str, list[bool]] = {kind: [] for kind in TASKS}
    for judgement, (_, task) in zip(judgements, cases, strict=True):
        right[task.kind].append(judgement.rewards[0] > judgement.rewards[1])
    shares = {kind: sum(found) / len(found) for kind, found in right.items()}
    assert min(shares.values()) > 0.8, shares


def test_the_critic_is_of_one_mind_about_right_and_wrong_responses_in_either_order():
    rng = random.Random(3)
    cases = [(canvas, task) for canvas, task in held_out(60) if task.kind in ("list", "describe")]
    items = []
    for index, (canvas, task) in enumerate(cases):
        one, other = rng.sample([digit for digit in range(10) if digit not in task.digits], 2)
        seen = [(*task.digits, one), (other, *task.digits[1:], one)]
        responses = (task.answer, *(say(task, digits) for digits in seen))
        items.append(Item(str(index), task.question, (canvas.image().convert("RGB"),), responses))
    judgements = PairwiseCritic(judge_model=engine(CRITIC), prompt=CRITIC_PROMPT, soft=True).judge(items)
    found = measure(judgements)
    assert found["consistency"].value > 0.85
    assert abs(found["position_bias"].value) < 0.05
