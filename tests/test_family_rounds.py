"""Two rounds of every family of ours through the real command, on the tiny random weights of its golden."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from align.cli import app
from align.dpo.tokenize import structured
from align.media.images import ImageStore
from align.models.families import FAMILIES
from align.models.load import load_model, load_processor, read_config
from align.models.weights import tensor_table
from tests.stage_runs import write_lines
from tests.tiny_models import random_image

GOLDENS = Path(__file__).parent / "golden"
# Settings of the processor that keep prompts short.
SETTINGS = {
    "llava_ov_original_tiny": {"image_aspect_ratio": "pad"},
    "valley25_tiny": {"max_pixels": 28 * 28 * 16},
    "valley_eagle_tiny": {"max_pixels": 28 * 28 * 16},
    "valley_v1_tiny": {},
    "vl360_tiny": {},
}
COMPANIONS = (".json", ".safetensors", ".txt", ".model", ".jinja")
CONFIG = {
    "policy": "./policy",
    "questions": "questions.jsonl",
    "rounds": 2,
    "sample": {"num_responses": 2, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "batch_size": 2},
    "pairs": {"keep_truncated": True},
    "dpo": {
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "logging_steps": 1,
    },
}


def make_project(golden, folder):
    recorded = ("cases.json", "golden.npz")
    files = [path for path in (GOLDENS / golden).iterdir() if path.suffix in COMPANIONS and path.name not in recorded]
    (folder / "policy").mkdir()
    for path in files:
        shutil.copyfile(path, folder / "policy" / path.name)
    (folder / "images").mkdir()
    questions = []
    for index in range(2):
        name = f"images/{index}.png"
        random_image(index, 60 + 20 * index, 50).save(folder / name)
        questions.append({"id": f"q{index}", "question": f"What is {index}?", "images": [name]})
    write_lines(folder / "questions.jsonl", questions)
    processor = SETTINGS[golden]
    critic = {
        "kind": "pairwise",
        "model": "./policy",
        "prompt": "pairwise_short",
        "options": {"soft": True},
        "processor": processor,
        "reliability_sample": 0,
    }
    config = {**CONFIG, "model": {"processor": processor}, "critic": critic}
    (folder / "align.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("golden", SETTINGS)
def test_two_rounds_give_a_checkpoint_in_the_form_of_the_first(golden, tmp_path):
    make_project(golden, tmp_path)
    result = CliRunner().invoke(app, ["run", "--config", str(tmp_path / "align.yaml")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rounds = [tmp_path / "runs" / "run" / f"round-{number}" for number in (1, 2)]
    for folder in rounds:
        stages = json.loads((folder / "manifest.json").read_text())["stages"]
        for stage in ("sample", "score", "dpo"):
            assert "log-probabilities agree" in stages[stage]["notes"]["shared_prefix"]
        assert stages["dpo"]["counts"]["steps"] == 1
    policy, last = tmp_path / "policy", rounds[-1] / "checkpoint"
    assert {name: info.shape for name, info in tensor_table(policy).items()} == {
        name: info.shape for name, info in tensor_table(last).items()
    }
    first, trained = load_file(policy / "model.safetensors"), load_file(last / "model.safetensors")
    assert any(not torch.equal(first[name], trained[name]) for name in first)
    before, after = read_config(policy), read_config(last)
    assert {key: after.get(key) for key in before} == before
    assert type(load_model(last)) is FAMILIES[before["architectures"][0]].model
    assert load_processor(last).tokenizer.get_vocab() == load_processor(policy).tokenizer.get_vocab()


def test_every_family_is_tried():
    tried = {read_config(GOLDENS / golden)["architectures"][0] for golden in SETTINGS}
    # Chinese-Valley is Valley 1 with another vision tower.
    assert tried == set(FAMILIES) - {"LlavaLlamaForCausalLM"}


@pytest.mark.parametrize(
    ("golden", "num_tokens"),
    # 14 x 14 for each frame and a newline for all; 2 x 2 merged patches for each frame of 60 x 50 pixels.
    [("llava_ov_original_tiny", 2 * 196 + 1), ("valley25_tiny", 2 * 4)],
)
def test_a_video_is_asked_about_as_the_family_looks_at_videos(golden, num_tokens, tmp_path):
    make_project(golden, tmp_path)
    for index in range(5):
        (tmp_path / "clip").mkdir(exist_ok=True)
        random_image(index, 60, 50).save(tmp_path / "clip" / f"{index}.png")
    write_lines(tmp_path / "questions.jsonl", [{"id": "v", "question": "What happens?", "video": "clip"}])
    command = ["--config", str(tmp_path / "align.yaml"), "--set", "model.processor.num_video_frames=2"]
    for stage in ("sample", "score", "dpo"):
        result = CliRunner().invoke(app, [stage, *command], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    round_ = tmp_path / "runs" / "run" / "round-1"
    pair = json.loads((round_ / "pairs.jsonl").read_text())
    assert pair["images"] == ["clip/0.png#frame", "clip/4.png#frame"]
    processor = load_processor(round_ / "checkpoint")
    frames = [ImageStore(tmp_path).open(name) for name in pair["images"]]
    text = processor.apply_chat_template(structured(pair["prompt"]), add_generation_prompt=True)
    ids = processor(text=[text], images=[frames])["input_ids"][0]
    assert ids.count(processor.image_token_id) == num_tokens
