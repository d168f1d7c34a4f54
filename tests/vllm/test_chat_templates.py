"""The templates that vLLM renders write what our processors write. Needs no vLLM: transformers renders them alike."""

import pytest

from align.engines.vllm.chat_template import chat_template, image_mark
from align.errors import UserError
from align.models.load import load_processor
from tests.models.goldens import GOLDENS, ONEVISION, VALLEY1, VALLEY_EAGLE, VL360

FOLDERS = pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


CONVERSATIONS = {
    "text": [{"role": "user", "content": "Why?"}],
    "text in parts": [{"role": "user", "content": [text("Why"), text(" not?")]}],
    "image in front": [{"role": "user", "content": [IMAGE, text("Why?")]}],
    "image alone": [{"role": "user", "content": [IMAGE]}],
    "image behind": [{"role": "user", "content": [text("Why?"), IMAGE]}],
    "named in the text": [{"role": "user", "content": [IMAGE, text("Is <image> red?")]}],
    "system of its own": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, text("Why?")]},
    ],
    "second turn": [
        {"role": "user", "content": [IMAGE, text("Why?")]},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And {{ then }}?"},
    ],
}
SEVERAL = {
    "two in front": [{"role": "user", "content": [IMAGE, IMAGE, text("Which?")]}],
    "around a text": [{"role": "user", "content": [IMAGE, text("or"), IMAGE]}],
    "two named": [{"role": "user", "content": [IMAGE, IMAGE, text("<image> or <image>?")]}],
    "one per turn": [
        {"role": "user", "content": [IMAGE, text("Why?")]},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": [text("And"), IMAGE]},
    ],
}


def rendered(processor, conversation):
    return processor.tokenizer.apply_chat_template(
        conversation, chat_template=chat_template(processor), add_generation_prompt=True, tokenize=False
    )


def expected(golden, processor, conversation):
    """The processor's own text with vLLM's mark for an image in the places of its own."""
    written = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    if golden is VALLEY1:
        num_images = sum(part == IMAGE for message in conversation for part in message["content"] if message["content"])
        return written.replace("<vi_frame>", "<vi_frame>" * num_images)
    return written.replace("<image>", image_mark(processor))


@FOLDERS
@pytest.mark.parametrize("name", [*CONVERSATIONS, *SEVERAL])
def test_the_text_is_that_of_the_processor(golden, name):
    if name in SEVERAL and golden is VL360:
        pytest.skip("360VL takes one image")
    if name == "two named" and golden is VALLEY1:
        pytest.skip("Valley 1 shows all pictures in one place")
    conversation = {**CONVERSATIONS, **SEVERAL}[name]
    processor = load_processor(golden.folder)
    assert rendered(processor, conversation) == expected(golden, processor, conversation)


def test_the_system_turn_is_that_of_the_settings():
    for system in (None, 'Say "yes" or\n{{ no }}.'):
        processor = load_processor(VALLEY_EAGLE.folder, default_system=system)
        conversation = CONVERSATIONS["image in front"]
        assert rendered(processor, conversation) == expected(VALLEY_EAGLE, processor, conversation)


def test_texts_that_name_another_number_of_images_are_refused():
    conversation = [{"role": "user", "content": [IMAGE, text("<image> or <image>?")]}]
    with pytest.raises(Exception, match="expected the texts to name all 1 images as <image> or none, found 2"):
        rendered(load_processor(VALLEY_EAGLE.folder), conversation)


def test_a_tokenizer_without_an_image_token_marks_images_by_another_special_token():
    assert image_mark(load_processor(VALLEY_EAGLE.folder)) == "<|image_pad|>"
    processor = load_processor(ONEVISION.folder)
    mark = image_mark(processor)
    assert mark in processor.tokenizer.all_special_tokens
    assert processor.tokenizer(mark, add_special_tokens=False)["input_ids"] == [
        processor.tokenizer.convert_tokens_to_ids(mark)
    ]


def test_a_black_image_for_questions_of_text_alone_is_refused():
    with pytest.raises(UserError, match="text_only_image"):
        chat_template(load_processor(VALLEY_EAGLE.folder, text_only_image="black"))
