"""Configurations of other trainers are what the page says, every key is accounted for, and what comes of them opens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from trl import DPOConfig, ModelConfig
from typer.testing import CliRunner

from align.cli import app
from align.config import Config, build_config, load_config
from align.dpo.settings import RECIPE, check_effects, check_fields, training_arguments, training_fields
from align.errors import UserError
from align.migrate.convert import convert
from align.migrate.read import read_settings, settings_of_script
from align.migrate.tables import HERE, LEFT_OUT, THEIRS, TOOLS
from align.models.lora import lora_config
from align.strict_yaml import parse_yaml
from tests.data.sources import imported, lines, reply, save_pictures
from tests.migrated import CASES, Case
from tests.migrating import BLOCKS, defaults, table_of


def parsed(folder: Path, text: str) -> dict[str, Any]:
    path = folder / ("theirs.sh" if "\\\n" in text else "theirs.yaml")
    path.write_text(text)
    return read_settings(path)


def opens(result: dict[str, Any], base: Path) -> Config:
    """The configuration, which TRL and peft take as well: what stands under dpo is theirs to know."""
    config = build_config(result, base=base)
    check_fields(config.dpo)
    lora_config(config.dpo.lora)
    fields = training_fields(config, base, torch.device("cpu"), torch.float32)
    check_effects(training_arguments(fields | {"bf16": False}), config.dpo.trainer_fields())
    return config


@pytest.mark.parametrize("tool", TOOLS)
def test_the_page_has_the_tables_of_the_code(tool):
    assert table_of(tool) == {key: text.partition(" ")[0] if text.startswith("-") else text for key, text in TOOLS[tool].items()}  # fmt: skip
    place = list(TOOLS).index(tool)
    for name, cells in defaults().items():
        for cell, value in ((cells[place], LEFT_OUT[name][place]), (cells[-1], HERE.get(name, THEIRS))):
            if cell.startswith("`") and cell.count("`") == 2 and not isinstance(value, str):
                assert parse_yaml(cell.strip("`")) == value, name
    assert defaults().keys() == LEFT_OUT.keys()


@pytest.mark.parametrize("tool", TOOLS)
def test_the_example_of_the_page_is_the_configuration_below_it(tool, tmp_path):
    (text,) = [text for title, text in BLOCKS.items() if title.startswith(f"{tool}/dpo.")]
    done = convert(parsed(tmp_path, text))
    assert done.tool == tool
    assert done.values == parse_yaml(BLOCKS[f"{tool}/align.yaml"])
    opens(done.values, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_another_configuration_means_the_same_here(case: Case, tmp_path):
    settings = parsed(tmp_path, case.text)
    done = convert(settings)
    assert done.tool == case.tool
    assert done.values == parse_yaml(case.here)
    # Every key is carried over or left for a reason that is said.
    assert done.carried.keys() | done.left.keys() == settings.keys()
    assert not done.carried.keys() & done.left.keys()
    assert all(done.left.values())
    opens(done.values, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "kto", "model_name_or_path": "p"}, "LLaMA-Factory's stage: kto is not here"),
        ({"stage": "dpo", "pref_loss": "orpo"}, "pref_loss: orpo is not here"),
        ({"rlhf_type": "simpo", "model": "p"}, "ms-swift's rlhf_type: simpo is not here"),
        ({"stage": "dpo", "finetuning_type": "oft"}, "'oft' is not here"),
        ({"lr": 1}, "no keys of TRL, LLaMA-Factory or ms-swift: lr"),
    ],
)
def test_another_method_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        convert(settings)


def test_what_has_no_place_is_said_with_its_reason():
    theirs = {"model_name_or_path": "p", "lora_r": 8, "eval_steps": 5, "nonsense": 1, "load_in_4bit": False}
    done = convert(theirs | {"HF_ENDPOINT": "x", "use_cpu": True, "bnb_4bit_quant_type": "fp4"})
    assert done.left == {
        "lora_r": "no adapter is trained",
        "eval_steps": "nothing is evaluated there",
        "nonsense": "there is no such setting here",
        "load_in_4bit": "False is not known here, but True",
        "HF_ENDPOINT": "a variable of the environment, for whoever reads it",
        "use_cpu": "see model.device",
        "bnb_4bit_quant_type": "no adapter is trained",
    }
    by_epoch = convert(
        {"stage": "dpo", "eval_strategy": "epoch", "num_train_epochs": 2, "pref_loss": "ipo", "pref_ftx": 1.5}
    )
    dpo = by_epoch.values["dpo"]
    assert (dpo["eval_steps"], dpo["loss_type"], dpo["loss_weights"]) == (0.5, ["ipo", "sft"], [1.0, 1.5])


def test_numbers_in_quotes_and_empty_keys_are_understood():
    done = convert({"stage": "dpo", "lora_rank": "8", "pref_ftx": "0.5", "learning_rate": None})
    assert done.values["dpo"]["lora"] == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    assert done.values["dpo"]["loss_weights"] == [1.0, 0.5]
    assert (done.values["dpo"]["learning_rate"], done.left["learning_rate"]) == (5e-5, "nothing is set")


def test_what_is_frozen_by_name_is_not_said_to_be_left_out():
    said = convert({"stage": "dpo", "freeze_vision_tower": True, "freeze_multi_modal_projector": False})
    assert said.values["dpo"]["freeze"] == ["vision"]
    assert "dpo.freeze" not in said.added
    assert convert({"stage": "dpo", "freeze_vision_tower": False}).added["dpo.freeze"] == ["projector"]


def test_the_best_is_kept_only_where_they_look():
    blind = convert({"stage": "dpo", "load_best_model_at_end": True, "val_size": 0.1})
    for key in ("load_best_model_at_end", "val_size"):
        assert blind.left[key] == "nothing is evaluated there"
    looking = convert({"stage": "dpo", "eval_strategy": "steps", "load_best_model_at_end": True, "logging_steps": 20})
    assert (looking.values["dpo"]["keep"], looking.values["dpo"]["eval_steps"]) == ("best", 20)


def test_the_command_that_reads_their_pairs_is_named():
    assert (
        convert({"rlhf_type": "dpo", "dataset": "swift/RLAIF-V#20000"}).data
        == "align data swift/RLAIF-V --limit 20000 --out data"
    )
    assert (
        convert({"stage": "dpo", "dataset": "mine", "max_samples": 9}).data
        == "align data data/dataset_info.json --subset mine --limit 9 --out data"
    )
    assert convert({"model_name_or_path": "p", "dataset_name": "a/b"}).data == "align data a/b --out data"
    assert convert({"stage": "dpo", "dataset": "a, b"}).data == "align data SOURCE --out data"


def test_a_script_is_read_and_not_run(tmp_path):
    script = f"""
    export NPROC=4   # GPUs
    OUT=${{HOME_OF_RUNS:-runs}}/dpo
    touch {tmp_path}/run
    swift rlhf --model 'a b' --dataset x#20 'y#3' --max-pixels $((1280 * 28 * 28)) --bf16 \\
        --gradient_accumulation_steps $(expr 16 / $NPROC) --output_dir "$OUT" --beta=0.1
    """
    assert settings_of_script(script) == {
        "NPROC": 4,
        "OUT": "runs/dpo",
        "model": "a b",
        "dataset": ["x#20", "y#3"],
        "max_pixels": 1003520,
        "bf16": True,
        "gradient_accumulation_steps": 4,
        "output_dir": "runs/dpo",
        "beta": 0.1,
    }
    assert not (tmp_path / "run").exists()
    launched = (
        "accelerate launch --num_processes 8 dpo.py --use_peft --target_modules a b --bf16 x 2>&1 | tee --append log"
    )
    assert settings_of_script(launched) == {
        "num_processes": 8,
        "use_peft": True,
        "target_modules": ["a", "b"],
        "bf16": "x",
        "append": "log",
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("$LR", r"dpo.sh: \$LR is not set in the script; write its value"),
        ("$((exit 1))", "dpo.sh: only a shell works out"),
        ("run-$(date +%m)", r"dpo.sh: only a shell works out run-\$\(date\+%m\)"),
        ("${MODEL##*/}", "dpo.sh: only a shell works out"),
    ],
)
def test_what_only_a_shell_works_out_has_to_be_written_in(tmp_path, value, message):
    script = tmp_path / "dpo.sh"
    script.write_text(f"MODEL=a/b swift rlhf --model $MODEL --output_dir {value}\n")
    with pytest.raises(UserError, match=message):
        read_settings(script)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("swift rlhf --beta 0.1", "swift rlhf --beta 0.2", "beta is given more than once: 0.1 and 0.2; keep one"),
        ("swift rlhf --bf16", "swift rlhf --bf16 false", "bf16 is given more than once: True and False"),
        ("MAX_PIXELS=9 swift rlhf", "MAX_PIXELS=8 swift rlhf", "MAX_PIXELS is given more than once: 9 and 8"),
        ("swift rlhf --target_modules q_proj v_proj", "swift rlhf --target_modules q_proj", "target_modules is given"),
    ],
)
def test_two_commands_with_other_values_are_not_mixed(tmp_path, first, second, message):
    script = tmp_path / "dpo.sh"
    script.write_text(f"{first}\n{first}\n")
    once = read_settings(script)
    script.write_text(f"{first}\n{second}\n")
    with pytest.raises(UserError, match=message):
        read_settings(script)
    script.write_text(f"{first}\n")
    assert read_settings(script) == once


def test_the_command_writes_what_it_says(tmp_path):
    theirs = tmp_path / "dpo.yaml"
    theirs.write_text(BLOCKS["llama-factory/dpo.yaml"])
    command = ["init", str(tmp_path / "here"), "--from", str(theirs), "--policy", "mine"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    assert "read as a configuration of LLaMA-Factory\n  model_name_or_path -> policy\n" in said.output
    assert "\n  dpo.lora.lora_alpha: 16\n" in said.output
    assert "\n  template: the checkpoint's own chat template\n" in said.output
    config = load_config(tmp_path / "here" / "align.yaml")
    assert (Path(config.policy).name, config.dpo.freeze, config.rounds) == ("mine", ["vision", "projector"], 1)
    assert config.dpo.lora == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    assert config.dpo.trainer_fields()["learning_rate"] == 5e-6


def test_what_is_taken_for_left_out_is_what_trl_and_we_take(tmp_path):
    args: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    trl, ours, of_command_line, lora = DPOConfig(**args), DPOConfig(**RECIPE | args), ModelConfig(), peft.LoraConfig()
    of_transformers = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for name, (theirs, of_llama_factory, _) in LEFT_OUT.items():
        section, _, last = name.rpartition(".")
        if section == "dpo.lora":
            found = getattr(of_command_line, "lora_r" if last == "r" else last.replace("target", "lora_target"))
            assert found == (theirs or None)
            assert HERE.get(name) == getattr(lora, last)
        elif section == "dpo" and hasattr(trl, last):
            assert getattr(trl, last) == theirs, name
            assert last == "max_length" or getattr(ours, last) == HERE[name]
            if hasattr(of_transformers, last):
                assert getattr(of_transformers, last) == of_llama_factory, name
        elif name == "model.dtype":
            assert of_command_line.dtype == theirs


@pytest.mark.parametrize("tool", TOOLS)
def test_every_row_leads_to_a_setting_that_exists(tool, tmp_path):
    peft_fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} | {"quantize"}
    for theirs, text in TOOLS[tool].items():
        if text.startswith(("-", "freeze ")) or text == "sft":
            continue
        dotted, constant, value = text.removeprefix("list ").partition(": ")
        nested: Any = parse_yaml(value) if constant else _example(dotted)
        for part in reversed(dotted.split(".")):
            nested = {part: nested}
        first: dict[str, Any] = {"policy": "p", "questions": "q.jsonl"}
        if dotted == "dpo.keep":
            nested["dpo"]["eval_steps"] = 5
        config = build_config(first | nested, base=tmp_path, where=theirs)
        check_fields(config.dpo)
        assert set(config.dpo.lora or ()) <= peft_fields


def _example(dotted: str) -> Any:
    numbers = {
        "num_processes": 2,
        "num_machines": 2,
        "machine_rank": 1,
        "main_process_port": 29500,
        "max_length": 4096,
        "beta": 0.1,
        "warmup_steps": 0.1,
        "held_out": 0.1,
    }
    texts = {"dtype": "bfloat16", "attention": "sdpa"}
    return (numbers | texts).get(dotted.rpartition(".")[2], "x")


@pytest.mark.parametrize("tool", TOOLS)
def test_their_pairs_are_read_as_what_they_are(tool, tmp_path):
    (title,) = [title for title in BLOCKS if title.startswith(f"{tool}/pairs.")]
    source = tmp_path / title
    save_pictures(source.parent, 1, "kitten.jpg")
    source.write_text(BLOCKS[title])
    done = imported(source, tmp_path / "out")
    assert set(done.counts.formats.values()) == {tool}
    (pair,) = lines(tmp_path / "out" / "pairs.jsonl")
    assert (reply(pair, "chosen"), reply(pair, "rejected")) == ("A kitten.", "A puppy.")
    assert len(pair["images"]) == 1
