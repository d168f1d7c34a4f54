"""docs/migrating.md: its tables turn the examples of other trainers into the align.yaml that stands below them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from trl import DPOConfig, ModelConfig

from align.config import Config, build_config
from align.dpo.settings import RECIPE, check_effects, check_fields, training_arguments, training_fields
from align.models.lora import lora_config
from align.strict_yaml import parse_yaml
from tests.data.sources import imported, lines, reply, save_pictures
from tests.migrated import CASES, Case
from tests.migrating import BLOCKS, SECTIONS, converted, defaults_of, parsed, table_of


def opens(result: dict[str, Any], base: Path) -> Config:
    """The configuration, which TRL and peft take as well: what stands under dpo is theirs to know."""
    config = build_config(result, base=base)
    check_fields(config.dpo)
    lora_config(config.dpo.lora)
    fields = training_fields(config, base, torch.device("cpu"), torch.float32)
    check_effects(training_arguments(fields | {"bf16": False}), config.dpo.trainer_fields())
    return config


@pytest.mark.parametrize("tool", SECTIONS)
def test_the_tables_make_the_configuration_below_them(tool, tmp_path):
    (text,) = [text for title, text in BLOCKS.items() if title.startswith(f"{tool}/dpo.")]
    result = converted(tool, parsed(text))
    assert result == parse_yaml(BLOCKS[f"{tool}/align.yaml"])
    opens(result, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_another_configuration_means_the_same_here(case: Case, tmp_path):
    result = converted(case.tool, parsed(case.text))
    assert result == parse_yaml(case.here)
    opens(result, tmp_path)


def test_what_trl_and_we_take_for_left_out_is_what_the_page_says(tmp_path):
    theirs = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    of_command_line, ours = ModelConfig(), DPOConfig(
        **RECIPE, output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False
    )  # fmt: skip
    lora = peft.LoraConfig()
    said = defaults_of("trl")
    for name, (there, here) in said.items():
        section, _, last = name.rpartition(".")
        if section == "dpo.lora":
            found = getattr(of_command_line, "lora_r" if last == "r" else last.replace("target", "lora_target"))
            mine = getattr(lora, last)
        elif section == "dpo" and hasattr(theirs, last):
            found, mine = getattr(theirs, last), getattr(ours, last)
            mine = None if last == "max_length" else mine
        elif name == "model.dtype":
            found, mine = of_command_line.dtype, None
        else:
            assert name in ("dpo.freeze", "dpo.on_too_long", "model.processor.max_pixels")
            continue
        for cell, value in ((there, found), (here, mine)):
            if value is not None:
                assert parse_yaml(cell.strip("`")) == value, name
    defaults = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for name, (there, _) in defaults_of("llama-factory").items():
        field = name.removeprefix("dpo.")
        if hasattr(defaults, field):
            assert parse_yaml(there.strip("`")) == getattr(defaults, field), name


@pytest.mark.parametrize("tool", SECTIONS)
def test_every_row_leads_to_a_setting_that_exists(tool, tmp_path):
    for theirs, ours in table_of(tool).items():
        for name in ours:
            name = name.removeprefix("list ")
            if name == "dpo." or name.startswith("freeze "):
                continue
            dotted, constant, text = name.partition(": ")
            value = parse_yaml(text) if constant else _example(dotted)
            nested: Any = value
            for part in reversed(dotted.split(".")):
                nested = {part: nested}
            first: dict[str, Any] = {"policy": "p", "questions": "q.jsonl"}
            if dotted == "dpo.keep":
                nested["dpo"]["eval_steps"] = 5
            config = build_config(first | nested, base=tmp_path, where=theirs)
            check_fields(config.dpo)
            assert set(config.dpo.lora or ()) <= {field.name for field in dataclasses.fields(peft.LoraConfig)} | {
                "quantize"
            }


def _example(dotted: str) -> Any:
    numbers = {"num_processes": 2, "max_length": 4096, "beta": 0.1, "warmup_steps": 0.1, "strategy": "zero2"}
    numbers |= {"eval_steps": 5, "held_out": 0.1}
    texts = {"dtype": "bfloat16", "attention": "sdpa", "keep": "best"}
    return (numbers | texts).get(dotted.rpartition(".")[2], "x")


@pytest.mark.parametrize("tool", SECTIONS)
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
