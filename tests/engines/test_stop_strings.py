"""Families without an end token end their responses with a string."""

import pytest

from align.engines.local import LocalEngine
from align.models.load import load_model, load_processor


@pytest.fixture(scope="module")
def engine(request):
    folder = request.config.rootpath / "tests" / "golden" / "valley_v1_tiny"
    return LocalEngine(load_model(folder), load_processor(folder))


@pytest.mark.parametrize(
    ("text", "expected", "ended"),
    [
        ("### Assistant: A red cup.\n### Human:", "A red cup.", True),
        (" Assistant: A red cup.", "A red cup.", False),
        ("A red cup. ###", "A red cup.", True),
    ],
)
def test_a_stop_string_ends_a_response_and_is_cut_off(engine, text, expected, ended):
    tokens = engine.prompter.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert engine._read(tokens, False) == (expected, ended)
    assert engine._read(tokens, True)[1] is True
