"""Log-probabilities of given responses: against stock forwards of separate full sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.engines.base import GivenResponses, SamplingSettings
from align.engines.local import LocalEngine
from tests.engines.conftest import question, text_model, text_tokenizer
from tests.prefix.prefix_models import gemma3_sliding, make

SETTINGS = SamplingSettings(temperature=0.7, max_new_tokens=6)


def sampled(engine: LocalEngine, numbers: range) -> list[GivenResponses]:
    """Responses of the engine itself to some questions, as tokens."""
    requests = [question(number, num_images=number % 3) for number in numbers]
    found: dict[str, Any] = {}
    engine.sample(requests, SETTINGS, lambda result: found.__setitem__(result.id, result))
    return [
        GivenResponses(request.id, request.messages, request.images, found[request.id].token_ids)
        for request in requests
    ]


def weighed(engine: LocalEngine, given: list[GivenResponses], temperature: float) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    engine.loglikelihood(given, found.__setitem__, temperature=temperature)
    return found


def by_hand(model: Any, processor: Any, item: GivenResponses, temperature: float) -> list[list[float]]:
    """One full forward a response, nothing shared."""
    text = processor.apply_chat_template(item.messages, add_generation_prompt=True, tokenize=False)
    arguments = {"images": [list(item.images)]} if item.images else {}
    inputs = processor(text=[text], return_tensors="pt", **arguments)
    start = inputs["input_ids"].shape[1]
    rows = []
    for tokens in item.token_ids:
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            log_p = (model(**whole).logits[0].double() / temperature).log_softmax(dim=-1)
        rows.append([float(log_p[start - 1 + i, token]) for i, token in enumerate(tokens)])
    return rows


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weights_equal_those_of_separate_sequences(onevision: tuple[Any, Any], shared_prefix: str, temperature: float):
    model, processor = onevision
    engine = LocalEngine(model, processor, shared_prefix=shared_prefix)
    given = sampled(engine, range(5))
    image_token = model.config.image_token_id
    assert not any(image_token in tokens for item in given for tokens in item.token_ids)
    found = weighed(engine, given, temperature)
    for item in given:
        expected = by_hand(model, processor, item, temperature)
        assert [len(row) for row in found[item.id]] == [len(tokens) for tokens in item.token_ids]
        for ours, theirs in zip(found[item.id], expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_token_that_stands_for_an_image_ends_what_is_weighed(onevision: tuple[Any, Any]):
    model, processor = onevision
    engine = LocalEngine(model, processor)
    asked = question(1)
    image_token = model.config.image_token_id
    whole, cut, nothing = (5, 6, 7), (5, 6, image_token, 7), (image_token,)
    given = [
        GivenResponses("both", asked.messages, asked.images, (whole, cut)),
        GivenResponses("nothing", asked.messages, asked.images, (nothing,)),
    ]
    found = weighed(engine, given, 1.0)
    assert found["both"][1] == pytest.approx(found["both"][0][:2], abs=1e-5)
    assert found["nothing"] == [[]]


def test_a_model_without_a_shared_prefix_weighs_in_full_sequences_and_says_so():
    model, _ = make(gemma3_sliding)
    model.resize_token_embeddings(261)
    tokenizer = text_tokenizer()
    item = GivenResponses("q", [{"role": "user", "content": "What?"}], (), ((5, 6), (7,)))
    engine = LocalEngine(model, tokenizer)
    found = weighed(engine, [item], 1.0)["q"]
    assert "sliding" in engine.notes["shared_prefix"]
    for ours, theirs in zip(found, by_hand(model, tokenizer, item, 1.0), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_nothing_given_is_nothing_weighed():
    assert weighed(LocalEngine(text_model(), text_tokenizer()), [], 1.0) == {}
