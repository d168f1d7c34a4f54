"""Every recipe is found by name, resolves, is valid, and trains three steps on a tiny model."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch
import typer
import yaml

from align.cli import app
from align.config import CONFIG_NAME, load_config
from align.demo.data import demo_settings
from align.dpo.settings import training_arguments, training_fields
from align.dpo.train import run_dpo
from align.engines.judge import plan_critic
from align.errors import UserError
from align.plan.make import Machine, make_plan
from align.plan.text import plan_text
from align.recipes import HERE, recipe_names, recipe_text
from align.run.folder import RunDir
from align.stages.pairs import run_pairs
from tests.doc_player import worker_error_of
from tests.stage_runs import align, make_project

NAMES = [
    "demo",
    "llava-critic-3-rounds",
    "llava-critic-3-rounds-onevision",
    "one-gpu-full",
    "one-gpu-lora",
    "rlaif-v",
    "valley2-dpo",
    "valley2.5-mpo",
]
NUM_PAIRS = 6


def test_the_recipes_are_those_that_are_documented_and_stand_in_configs():
    assert recipe_names() == NAMES
    assert sorted(path.stem for path in (HERE.parent.parent / "configs").glob("*.yaml")) == NAMES


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("recipes"))
    lines = []
    for index in range(NUM_PAIRS):
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {index}?"}]}]
        chosen, rejected = (
            [{"role": "assistant", "content": [{"type": "text", "text": t}]}]
            for t in (("yes", "no no"), ("no no", "yes"))[index % 2]
        )
        lines.append(
            {"id": f"p{index}", "images": [f"images/{index}.png"], "prompt": prompt}
            | {"chosen": chosen, "rejected": rejected}
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(params=NAMES)
def recipe(request, project, tmp_path):
    """A recipe in a folder of its own, with the policy, questions and critic that a person would name."""
    text = recipe_text(request.param, policy=str(project / "policy"))
    (tmp_path / CONFIG_NAME).write_text(text)
    return tmp_path / CONFIG_NAME


def on_a_cpu(project):
    """What every recipe needs changed to run here: sizes and paths, nothing that says what the recipe is."""
    return [
        f"pairs_file={project / 'pairs.jsonl'}",
        f"image_root={project}",
        "model.dtype=float32",
        "model.device=cpu",
        "dpo.max_length=2048",
        "dpo.max_steps=3",
        "dpo.per_device_train_batch_size=1",
        "dpo.gradient_accumulation_steps=1",
        "dpo.bf16=false",
        "dpo.optim=adamw_torch",
        "dpo.optim_args=null",
    ]


def test_a_recipe_resolves_and_its_settings_are_valid(recipe, project):
    config = load_config(recipe, ["dpo.bf16=false"])
    assert config.rounds >= 1
    training_arguments(training_fields(config, recipe.parent / "trainer", torch.device("cpu"), torch.float32))
    if config.pairs_file is None:
        plan_critic(config)


def test_a_recipe_can_be_planned(recipe, project):
    config = load_config(
        recipe,
        [
            f"pairs_file={project / 'pairs.jsonl'}",
            "questions=",
            "evaluate.questions=",
            "rounds=1",
            f"image_root={project}",
        ],
    )
    plan = make_plan(config, Machine(8, 80.0, 350.0, 2500.0))
    assert f"{NUM_PAIRS} prompts" in plan_text(plan)


def test_a_recipe_trains_three_steps(recipe, project):
    config = load_config(recipe, on_a_cpu(project))
    run_pairs(config, 1)
    run_dpo(config, 1)
    this = RunDir(config.run_dir).round(1)
    counts = this.manifest.stage("dpo").counts
    assert counts["steps"] == 3
    assert counts["loss"] is not None
    history = json.loads((this.checkpoint / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) >= 1


def test_valley2_dpo_has_the_hyper_parameters_of_the_published_record(tmp_path):
    (tmp_path / CONFIG_NAME).write_text(recipe_text("valley2-dpo"))
    config = load_config(tmp_path / CONFIG_NAME, ["dpo.bf16=false"])
    args = training_arguments(training_fields(config, tmp_path, torch.device("cpu"), torch.float32))
    # specs: 8 x 1 x 2 = 16 pairs per step, so 100,000 pairs are 6250 steps, of which 63 are warm-up.
    assert config.launch.num_processes * args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert args.get_warmup_steps(6250) == 63
    assert (args.learning_rate, args.weight_decay, args.beta, args.label_smoothing) == (1e-6, 5e-4, 0.1, 0.0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert config.dpo.projector_learning_rate_multiplier * args.learning_rate == pytest.approx(3e-6)
    assert (args.lr_scheduler_type, args.train_sampling_strategy) == ("cosine", "group_by_length")
    assert (args.loss_type, args.num_train_epochs, args.seed) == (["sigmoid"], 1, 42)
    assert (config.dpo.max_length, config.dpo.freeze, config.launch.strategy) == (4096, ["vision"], "zero2")


def test_the_demos_recipe_says_what_the_demo_does():
    recipe = yaml.safe_load(recipe_text("demo"))
    demo = demo_settings(seed=0)
    assert json.loads(json.dumps(recipe)) == json.loads(json.dumps(demo))


def test_paths_given_to_init_stand_in_the_recipe(tmp_path):
    result = align(
        tmp_path, "init", "--recipe", "rlaif-v", "--policy", "my: policy", "--questions", "q.jsonl", "--critic", "c"
    )
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((tmp_path / CONFIG_NAME).read_text())
    assert (config["policy"], config["questions"], config["critic"]["model"]) == ("my: policy", "q.jsonl", "c")
    refused = align(tmp_path, "init", "other", "--recipe", "valley2-dpo", "--critic", "c")
    assert refused.returncode == 2
    assert "has no place for --critic" in refused.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_at_the_head_of_a_recipe_are_understood(name):
    lines = [line[1:].strip() for line in recipe_text(name).splitlines() if line.startswith("#   align ")]
    assert lines
    group = typer.main.get_command(app)
    for command in (part.split("(")[0] for line in lines for part in line.split(" && ")):
        subcommand, *arguments = shlex.split(command)[1:]
        assert worker_error_of(group.commands[subcommand], subcommand, arguments) is None


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean valley2-dpo"):
        recipe_text("valley-dpo")


def test_dpo_alone_makes_the_pairs_of_a_pairs_file_first(project, tmp_path):
    shutil.copytree(project, tmp_path / "p", ignore=shutil.ignore_patterns("runs"))
    folder = tmp_path / "p"
    (folder / CONFIG_NAME).write_text(recipe_text("valley2-dpo", policy="policy", pairs="pairs.jsonl"))
    overrides = [f"--set={override}" for override in on_a_cpu(folder)] + ["--set=launch.num_processes=1"]
    result = align(folder, "dpo", *overrides)
    assert result.returncode == 0, result.stderr
    stages = json.loads((folder / "runs/valley2-dpo/round-1/manifest.json").read_text())["stages"]
    assert set(stages) == {"pairs", "dpo"}
    assert stages["pairs"]["counts"]["pairs"] == NUM_PAIRS
