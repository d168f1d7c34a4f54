"""Options judged by a server: equal to the engine in this process where it can show enough, said where it cannot."""

import base64
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from align.config import Server, ServerSettings
from align.engines.base import SamplingSettings
from align.engines.local import LocalEngine
from align.engines.open import open_servers
from align.engines.server.options import Step, follow, read_steps
from reward.judge_model import BranchedPrompt
from tests import tiny_models
from tests.engines.conftest import collect, question
from tests.engines.stub_server import MODEL, StubServer, completion, is_probe

VOCABULARY = 264
SETTINGS = ServerSettings(backoff_s=0.01, concurrency=2, top_logprobs=VOCABULARY)
OPTIONS = ("yes", "yep", "no", "not at all")


class ModelBehindHttp:
    """Answers chat completions with a real model, greedily, as vLLM does: alternatives,
    and begun answers gone on with."""

    def __init__(self, model, processor, *, most=VOCABULARY, continues=True):
        self.engine = LocalEngine(model, processor, shared_prefix="off")
        self.most, self.continues = most, continues
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        tokens = self.engine.prompter.tokenizer.convert_ids_to_tokens(range(261))
        self.bytes_of = [[byte_of[token]] if token in byte_of else list(token.encode()) for token in tokens]

    def __call__(self, body):
        messages, images = read_messages(body["messages"])
        begun = ""
        if body.get("continue_final_message") and self.continues:
            begun = messages.pop()["content"][0]["text"]
        text = self.engine.prompter.render(messages) + begun
        ids, rows = [], []
        for _ in range(body["max_tokens"]):
            log_probs = self._next(text, images, ids)
            ids.append(int(log_probs.argmax()))
            rows.append(log_probs)
            if ids[-1] in self.engine.eos_token_ids:
                break
        answer = completion([self.engine._text(ids)])
        answer["usage"]["completion_tokens"] = len(ids)
        stopped = ids[-1] in self.engine.eos_token_ids
        answer["choices"][0]["finish_reason"] = "stop" if stopped else "length"
        if body.get("logprobs"):
            count = min(body.get("top_logprobs", 0), self.most)
            content = [self._token(token, row, count) for token, row in zip(ids, rows, strict=True)]
            answer["choices"][0]["logprobs"] = {"content": content}
        return answer

    def _next(self, text, images, ids):
        inputs = self.engine._encode([text], [images])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.int64)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            return self.engine.model(**inputs).logits[0, -1].float().log_softmax(-1)[:261]

    def _token(self, token, row, count):
        def shown(index):
            raw = self.bytes_of[index]
            return {"token": bytes(raw).decode(errors="replace"), "bytes": raw, "logprob": float(row[index])}

        top = row.topk(min(count, len(row))).indices.tolist()
        return shown(token) | {"top_logprobs": [shown(index) for index in top]}


def read_messages(messages):
    """Chat messages as the engine in this process takes them, and the images in them."""
    images, plain = [], []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].split(",")[1])
                images.append(Image.open(io.BytesIO(data)).convert("RGB"))
        kept = [part if part["type"] == "text" else {"type": "image"} for part in parts]
        plain.append({"role": message["role"], "content": kept})
    return plain, images


@pytest.fixture
def serve_model(onevision):
    started = []

    def start(**how):
        server = StubServer(answer=ModelBehindHttp(*onevision, **how))
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def engine_on(server, **changes):
    settings = SETTINGS.model_copy(update=changes)
    return open_servers([Server(url=server.url)], MODEL, settings, open_image=lambda image: image)


def an_ask(options=OPTIONS, num_images=1):
    images = tuple(tiny_models.random_image(index, 40, 30) for index in range(num_images))
    return BranchedPrompt(images, "Judge.", "Is it ", (("red",), ("a dog",)), "?", options)


def test_log_probs_of_options_of_many_tokens_equal_the_local_engines(serve_model, onevision):
    prompts = [an_ask(), an_ask(("yes", "no"), num_images=0)]
    engine = engine_on(serve_model())
    found = engine.log_probs(prompts)
    wanted = LocalEngine(*onevision, shared_prefix="off").log_probs(prompts)
    for mine, theirs in zip(found, wanted, strict=True):
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert "options judged by their first tokens alone" not in engine.notes
    assert "continues a partial answer" in engine.notes["servers"]


def test_greedy_samples_and_judgements_equal_the_local_engines(serve_model, onevision):
    greedy = SamplingSettings(temperature=0.0, max_new_tokens=12)
    requests = [question(number, num_images=number % 3, num_samples=2) for number in range(4)]
    server = engine_on(serve_model())
    local = LocalEngine(*onevision, shared_prefix="off")
    mine, theirs = (collect(engine, requests, greedy) for engine in (server, local))
    # A server does not say which tokens it drew.
    assert mine == {id_: replace(result, token_ids=()) for id_, result in theirs.items()}
    assert server.generate([an_ask(())], max_new_tokens=9) == local.generate([an_ask(())], max_new_tokens=9)


def test_without_going_on_options_have_the_probability_of_the_tokens_in_which_they_differ(serve_model, onevision):
    engine = engine_on(serve_model(continues=False))
    (mine,) = engine.log_probs([an_ask()])
    (first_tokens,) = LocalEngine(*onevision, shared_prefix="off").log_probs([an_ask(("y", "n"))])
    shared_evenly = first_tokens[:, [0, 0, 1, 1]] - math.log(2)
    np.testing.assert_allclose(mine, shared_evenly, atol=2e-5)
    assert engine.notes["options judged by their first tokens alone"] == "2"


def test_an_option_outside_of_the_alternatives_has_no_probability(serve_model):
    model = ModelBehindHttp.__call__
    server = serve_model(most=3)
    written = model(server.answer, {"messages": [{"role": "user", "content": "Is it red?"}], "max_tokens": 1})
    assert written["usage"]["completion_tokens"] == 1
    (mine,) = engine_on(server).log_probs([an_ask(tuple("abcdefghijklmnopqrstuvwxyz"))])
    assert (np.isfinite(mine).sum(axis=1) <= 3).all()
    assert np.isneginf(mine).any()


def test_a_server_without_alternatives_has_its_verdict_read_from_its_text():
    def answer(body):
        text = "The Second one is better, since the first one names no colour." if not is_probe(body) else "Hello."
        return completion([text])

    server = StubServer(answer=answer)
    engine = engine_on(server)
    (found,) = engine.log_probs([an_ask(("The first", "The second", "Neither"))])
    server.stop()
    assert found.tolist() == [[-math.inf, 0.0, -math.inf]] * 2
    assert engine.notes["verdicts read from text, without log-probabilities"] == "2"


def test_a_verdict_that_cannot_be_read_chooses_nothing():
    server = StubServer(answer=lambda body: completion(["I cannot say."]))
    (found,) = engine_on(server).log_probs([an_ask(("first", "second"))])
    server.stop()
    assert np.isneginf(found).all()


def test_an_option_takes_the_longest_alternative_that_it_begins_with():
    # "yes" may be written as y-e-s, ye-s or yes; tokenisers write the longest.
    steps = [Step(b"no", {b"no": -0.1, b"y": -5.0, b"ye": -4.0, b"yes": -3.0, b"": -1.0})]
    done, left = follow(steps, b"", -1.0, {0: b"yes", 1: b"yet", 2: b"no", 3: b"maybe"})
    assert done == {0: -4.0, 2: -1.1}
    assert left == {(b"ye", -5.0): {1: b"t"}}


@pytest.mark.parametrize(
    "log_probs",
    [
        [-0.5],
        {"content": ["yes"]},
        {"content": [{"token": "yes", "top_logprobs": [{"token": "no"}]}]},
        {"content": [{"token": "yes", "logprob": None, "top_logprobs": [{"token": "no", "logprob": -1.0}]}]},
    ],
)
def test_alternatives_in_another_form_are_none(log_probs):
    assert read_steps({"logprobs": log_probs}) is None
