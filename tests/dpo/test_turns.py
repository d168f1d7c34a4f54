"""A chat template that does not end responses, or does not begin the assistant's turn, is reported before training."""

from __future__ import annotations

import json

import pytest

from align.dpo.turns import NO_END, NO_HEADER, turn_faults

HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_a_template_that_begins_and_ends_turns_has_no_fault(tmp_path, processor):
    assert turn_faults(processor, str(tmp_path)) == []


def test_a_response_without_an_end_token_is_reported(tmp_path, processor):
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "#")
    assert turn_faults(processor, str(tmp_path)) == [NO_END]
    # Generation may stop at other tokens than the tokenizer's own.
    ends = processor.tokenizer("#", add_special_tokens=False)["input_ids"]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, *ends]}))
    assert turn_faults(processor, str(tmp_path)) == []


def test_a_template_without_a_generation_prompt_is_reported(tmp_path, processor):
    if HEADER not in processor.chat_template:
        pytest.fail(f"the template of the tests has changed: {processor.chat_template}")
    processor.chat_template = processor.chat_template.replace(HEADER, "")
    assert turn_faults(processor, str(tmp_path)) == [NO_HEADER]
