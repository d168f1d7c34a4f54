"""A record that cannot be rendered or encoded is named; templates that never end are stopped."""

import pytest
import torch
from PIL import Image

from align.engines import prompts
from align.engines.prompts import Prompter, check_prompts
from align.errors import UserError
from align.models.record_faults import TookTooLong, UnusableRecord, bounded_time, record_faults
from tests import tiny_models

ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{{ message.content }}{% endfor %}"
)
ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}{% endfor %}"
NULLS = (
    "{% for message in messages %}{% for part in message.content %}{% if 'image' in part or part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def prompter(template):
    processor = tiny_models.llava_onevision_processor()
    processor.chat_template = template
    return Prompter(processor, lambda image: image)


@pytest.mark.parametrize("roles", [["system", "user"], ["user", "user"], ["assistant"]])
def test_turns_that_a_template_refuses_name_the_record(roles):
    messages = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in roles]
    with (
        pytest.raises(
            UnusableRecord, match="question q7: cannot be rendered: Conversation roles must alternate"
        ) as error,
        record_faults("question q7", "cannot be rendered"),
    ):
        prompter(ALTERNATING).render(messages)
    assert error.value.reason == "cannot be rendered"


def test_a_picture_that_a_processor_refuses_names_the_record():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    refused = pytest.raises(UnusableRecord, match=r"question q7: .*aspect ratio")
    with refused, record_faults("question q7", "cannot be encoded"):
        Qwen2VLImageProcessorPil()(Image.new("RGB", (1800, 4)), return_tensors="pt")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUDA error: out of memory"), AssertionError("ours")],
)
def test_faults_of_the_machine_are_not_the_record_s(error):
    with pytest.raises(type(error)), record_faults("question q7", "cannot be encoded"):
        raise error


def test_a_user_error_keeps_its_advice_and_names_the_record():
    refused = pytest.raises(UnusableRecord, match="question q7: no such image; check the path")
    with refused, record_faults("question q7", "cannot be read"):
        raise UserError("no such image", fix="check the path")


def test_null_parts_are_no_images():
    parts = [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "Why?", "image": None}]
    assert prompter(NULLS).render([{"role": "user", "content": parts}]) == "<image>Why?"


def test_a_template_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(prompts, "MAX_RENDER_S", 0.25)
    processor = tiny_models.llava_onevision_processor()
    processor.chat_template = ENDLESS
    with pytest.raises(UserError, match=r"the chat template cannot be used: it did not end within 0\.25 s"):
        check_prompts(processor, "policy")


def test_what_ends_in_time_is_not_touched():
    with bounded_time(5):
        assert sum(range(10)) == 45
    with pytest.raises(TookTooLong), bounded_time(0.01):
        spin()


def spin():
    while True:
        pass
