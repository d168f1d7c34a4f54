"""Vision-language models that transformers brings, through the real commands: sample, score, dpo, open again."""

import json

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from align.cli import app
from align.models.load import load_model, load_processor
from align.models.weights import tensor_table
from tests.stage_runs import write_lines
from tests.tiny_models import random_image
from tests.tiny_vlms import VLMS, save

# Layers with a sliding window and images that see themselves from both sides: the shared prefix is not exact.
PLAIN = {"gemma3": "sliding window"}
SETTINGS = {
    "policy": "./policy",
    "questions": "questions.jsonl",
    "rounds": 1,
    "sample": {"num_responses": 2, "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "batch_size": 2},
    "critic": {"kind": "pairwise", "model": "./policy", "prompt": "pairwise_short", "options": {"soft": True}},
    "pairs": {"keep_truncated": True},
    "dpo": {
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "logging_steps": 1,
    },
}


def make_project(name, folder):
    save(name, folder / "policy")
    (folder / "images").mkdir()
    questions = []
    for index, num_images in enumerate((1, 1, 2, 0)):
        images = [f"images/{index}-{number}.png" for number in range(num_images)]
        for number, path in enumerate(images):
            random_image(index + number, 30 + 12 * index, 40).save(folder / path)
        questions.append({"id": f"q{index}", "question": f"What is {index}?", "images": images})
    write_lines(folder / "questions.jsonl", questions)
    (folder / "align.yaml").write_text(yaml.safe_dump(SETTINGS))


def run(folder, *command):
    result = CliRunner().invoke(app, [*command, "--config", str(folder / "align.yaml")], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", VLMS)
def test_a_round_through_the_real_commands(name, tmp_path):
    make_project(name, tmp_path)
    for stage in ("sample", "score", "dpo"):
        run(tmp_path, stage)
    round_ = tmp_path / "runs" / "run" / "round-1"
    stages = json.loads((round_ / "manifest.json").read_text())["stages"]
    samples = [json.loads(line) for line in (round_ / "samples.jsonl").read_text().splitlines()]
    assert [len(line["responses"]) for line in samples] == [2, 2, 2, 2]
    for stage in ("sample", "score", "dpo"):
        note = stages[stage]["notes"]["shared_prefix"]
        if name in PLAIN:
            assert PLAIN[name] in note, note
        else:
            assert "shared and unshared log-probabilities agree" in note, note
    assert stages["dpo"]["counts"]["steps"] == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "policy", round_ / "checkpoint"))
    assert before.keys() == after.keys()
    assert any((before[key] != after[key]).any() for key in before)
    reopened = load_model(round_ / "checkpoint")
    assert type(reopened) is type(load_model(tmp_path / "policy"))
    assert tensor_table(round_ / "checkpoint").keys() == tensor_table(tmp_path / "policy").keys()
    load_processor(round_ / "checkpoint")
