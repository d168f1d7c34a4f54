"""`align serve` prints a whole command line for vLLM, from the run's questions and settings;
it needs no vLLM for that."""

import json
import shlex

import pytest
import yaml
from typer.testing import CliRunner

from align.cli import app
from tests.models import tiny_valley
from tests.stage_runs import write_lines
from tests.tiny_models import random_image


def command(*arguments):
    result = CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    words = shlex.split(result.output.splitlines()[0])
    assert words[:2] == ["vllm", "serve"]
    # A build of vLLM for the CPU is told more, by options without a value too.
    following = zip(words[3:], [*words[4:], "--"], strict=True)
    return words[2], {word: value for word, value in following if word.startswith("--")}, result.output


@pytest.fixture
def project(tmp_path):
    """Questions with one and two images; the longest prompt has two."""
    tiny_valley.folder(tmp_path / "policy")
    (tmp_path / "images").mkdir()
    for index in range(2):
        random_image(index, 60 + 20 * index, 50).save(tmp_path / f"images/{index}.png")
    write_lines(
        tmp_path / "questions.jsonl",
        [
            {"id": "one", "question": "what is this", "images": ["images/0.png"]},
            {"id": "two", "question": "what is this", "images": ["images/0.png", "images/1.png"]},
        ],
    )
    settings = {
        "policy": "./policy",
        "questions": "questions.jsonl",
        "model": {"processor": {"max_pixels": 28 * 28 * 4}},
        "sample": {"max_new_tokens": 9},
        "critic": {"kind": "pairwise", "model": "./policy"},
    }
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_the_command_of_a_round_is_made_of_its_questions(project):
    from align.models.load import load_processor

    checkpoint, options, output = command("--round", "1", "--config", str(project / "align.yaml"))
    assert checkpoint == str(project / "policy")
    assert options["--served-model-name"] == "policy-0"
    assert options["--host"] == "127.0.0.1"
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 2}
    assert json.loads(options["--mm-processor-kwargs"]) == {"max_pixels": 28 * 28 * 4}
    processor = load_processor(checkpoint, max_pixels=28 * 28 * 4)
    chat = [{"role": "user", "content": [*([{"type": "image"}] * 2), {"type": "text", "text": "what is this"}]}]
    images = [random_image(index, 60 + 20 * index, 50) for index in range(2)]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    longest = len(processor(text=[text], images=[images])["input_ids"][0])
    assert options["--max-model-len"] == str(longest + 9)
    assert "sample.servers: [{url: 'http://127.0.0.1:8000', model: policy-0}]" in output


def test_the_template_and_what_ends_a_response_are_written_beside(project):
    from align.engines.vllm.chat_template import chat_template
    from align.models.load import load_processor

    _, options, _ = command("--round", "1", "--config", str(project / "align.yaml"))
    with open(options["--chat-template"]) as file:
        assert file.read() == chat_template(load_processor(project / "policy"))
    assert options["--chat-template-content-format"] == "openai"
    with open(f"{options['--generation-config']}/generation_config.json") as file:
        assert json.load(file) == {"eos_token_id": [tiny_valley.tokenizer().convert_tokens_to_ids("<|im_end|>")]}


def test_a_checkpoint_alone_is_served_under_its_folders_name(project, monkeypatch):
    monkeypatch.chdir(project)
    checkpoint, options, _ = command("policy", "--port", "8123", "--data-parallel-size", "2", "--host", "0.0.0.0")
    assert (checkpoint, options["--served-model-name"]) == ("policy", "policy")
    assert (options["--port"], options["--host"], options["--data-parallel-size"]) == ("8123", "0.0.0.0", "2")


def test_the_critic_is_served_for_the_images_of_the_questions(project):
    _, options, output = command("--critic", "--config", str(project / "align.yaml"))
    assert options["--served-model-name"] == "critic"
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 2}
    assert "critic.servers" in output
