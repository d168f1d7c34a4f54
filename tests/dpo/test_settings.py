"""The dpo section: every field of TRL can be set, ours are kept, everything else is refused in one go."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from trl import DPOConfig

from align.config import build_config
from align.dpo.settings import OWN_FIELDS, RECIPE, check_fields, training_arguments, training_fields
from align.errors import UserError

CPU = torch.device("cpu")


def config_with(folder, **dpo):
    return build_config({"policy": "p", "questions": "q.jsonl", "seed": 11, "dpo": dpo}, base=folder)


def test_every_field_of_trl_can_be_set_but_our_own(tmp_path):
    ours = {"max_length", "report_to"}
    fields = {field.name for field in dataclasses.fields(DPOConfig) if field.init} - OWN_FIELDS.keys() - ours
    hints = get_type_hints(DPOConfig)
    flags = {name for name in fields if {bool, type(None)} >= {*(get_args(hints[name]) or [hints[name]])}}
    check_fields(config_with(tmp_path, **(dict.fromkeys(fields, 1) | dict.fromkeys(flags, True))).dpo)
    assert len(fields) > 100


def test_what_is_set_reaches_trl_and_the_rest_is_the_recipe(tmp_path):
    set_here = {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "adam_beta2": 0.95, "seed": 5}
    args = training_arguments(training_fields(config_with(tmp_path, **set_here), tmp_path / "t", CPU, torch.float32))
    for name, value in set_here.items():
        assert getattr(args, name) == value
    for name in RECIPE.keys() - set_here.keys():
        assert getattr(args, name) == RECIPE[name], name
    assert args.report_to == [], "TensorBoard's numbers are ours to write"
    assert args.run_name == f"run {tmp_path.name}"


def test_a_number_in_quotes_is_the_number(tmp_path):
    given = {"learning_rate": "5e-7", "adam_beta2": "0.95", "max_steps": "20", "warmup_steps": "0.1", "optim": "sgd"}
    args = training_arguments(training_fields(config_with(tmp_path, **given), tmp_path / "t", CPU, torch.float32))
    found = [getattr(args, name) for name in given]
    assert found == [5e-7, 0.95, 20, 0.1, "sgd"]
    assert isinstance(args.max_steps, int)


def test_the_run_decides_what_is_not_for_the_section_to_decide(tmp_path):
    args = training_arguments(training_fields(config_with(tmp_path, max_length=77), tmp_path / "t", CPU, torch.float32))
    assert args.output_dir == str(tmp_path / "t")
    assert args.seed == 11
    assert args.max_length is None, "the limit is ours, and TRL would truncate"
    assert args.use_cpu
    assert not args.bf16
    assert not args.gradient_checkpointing
    assert not args.remove_unused_columns


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_are_understood(tmp_path, name):
    if name not in {field.name for field in dataclasses.fields(DPOConfig)}:
        pytest.skip("this transformers knows the old name only")
    args = training_arguments(
        training_fields(config_with(tmp_path, **{name: True}), tmp_path / "t", CPU, torch.float32)
    )
    assert args.gradient_checkpointing


def test_all_faults_are_told_at_once(tmp_path):
    faulty = config_with(tmp_path, bta=0.1, output_dir="x", learning_rate=1e-6, nonsense_without_neighbour=1)
    with pytest.raises(UserError) as error:
        check_fields(faulty.dpo)
    text = str(error.value)
    assert "dpo.bta: unknown key (did you mean 'beta'?)" in text
    assert "dpo.output_dir cannot be set" in text
    assert "dpo.nonsense_without_neighbour: unknown key" in text
    assert "learning_rate" not in text
