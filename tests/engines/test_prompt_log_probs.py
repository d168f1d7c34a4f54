"""Given responses are weighed by a server's prompt log-probabilities: as a model in this process would, or not at all."""

import math

import numpy as np
import pytest

from align.config import Server, ServerSettings
from align.engines.base import GivenResponses
from align.engines.open import open_servers
from align.engines.server.prompt_log_probs import at_temperature
from align.errors import UserError
from align.models.load import load_processor
from tests.engines.prompt_reader import prompt_read
from tests.engines.stub_server import MODEL, Reply, StubServer, completion, is_probe
from tests.patience import PATIENCE_S
from tests.tiny_models import random_image, save_llava_onevision

IMAGE = {"type": "image"}
VOCABULARY = 264


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_llava_onevision(tmp_path_factory.mktemp("model") / "policy")


@pytest.fixture(scope="module")
def processor(checkpoint):
    return load_processor(checkpoint)


def log_probs_at(place):
    """What the stub's model finds likely there: peaked, as after training."""
    logits = 4 * np.random.default_rng(place).standard_normal(VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


@pytest.fixture
def weighing(processor):
    """A server with prompt log-probabilities of `log_probs_at`; `server.cut`: it reads what it was sent otherwise."""

    def answer(body):
        if is_probe(body):
            return completion(["x"] * body.get("n", 1))
        ids = prompt_read(processor, body["messages"])
        entries = [None]
        for place, token in enumerate(ids[1:], start=1):
            values = log_probs_at(place)
            likeliest = np.argsort(-values)[: body["prompt_logprobs"]]
            entries.append({str(one): {"logprob": values[one]} for one in {*likeliest.tolist(), token}})
        ids = [7, *ids[1:]] if server.cut else ids
        return completion(["x"], token_ids=[1]) | {"prompt_token_ids": ids, "prompt_logprobs": entries}

    server = StubServer(answer=answer)
    server.cut = False
    yield server
    server.stop()


def engine_on(server, checkpoint, **changes):
    settings = ServerSettings(backoff_s=0.01, timeout_s=PATIENCE_S, compare_prompts=False, **changes)
    named = [Server(url=server.url, model=MODEL)]
    return open_servers(named, checkpoint and str(checkpoint), settings, open_image=lambda image: image)


def given(processor, *texts, num_images=1):
    question = {"role": "user", "content": [*([IMAGE] * num_images), {"type": "text", "text": "What?"}]}
    end = processor.tokenizer.eos_token_id
    token_ids = tuple((*processor.tokenizer.encode(text, add_special_tokens=False), end) for text in texts)
    images = tuple(random_image(index, 40, 30) for index in range(num_images))
    return GivenResponses(f"q{num_images}", [question], images, token_ids)


def weighed(engine, *items, temperature):
    found = {}
    engine.loglikelihood(items, found.__setitem__, temperature=temperature)
    return found


def expected(processor, item, temperature):
    """From the whole distributions."""
    messages = [*item.messages, {"role": "assistant", "content": ""}]
    text = processor.apply_chat_template(item.messages, add_generation_prompt=True)
    start = len(processor(text=[text], images=[list(item.images)])["input_ids"][0])
    assert len(messages) == 2
    rows = []
    for token_ids in item.token_ids:
        row = []
        for place, token in enumerate(token_ids, start=start):
            scaled = log_probs_at(place) / temperature
            row.append(scaled[token] - np.log(np.exp(scaled).sum()))
        rows.append(row)
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_responses_are_weighed_at_the_temperature_they_were_drawn_at(weighing, checkpoint, processor, temperature):
    engine = engine_on(weighing, checkpoint, top_logprobs=20)
    item = given(processor, "a cup", "two red cups")
    (rows,) = weighed(engine, item, temperature=temperature).values()
    exact = expected(processor, item, temperature)
    assert [len(row) for row in rows] == [len(row) for row in exact]
    if temperature == 1.0:
        assert rows == [pytest.approx(row, abs=1e-9) for row in exact]
        assert "log-probabilities" not in engine.notes
        return
    note = engine.notes["log-probabilities"]
    assert note.startswith("from the 20 likeliest tokens of each place")
    off = max(abs(math.fsum(row) - math.fsum(others)) for row, others in zip(rows, exact, strict=True))
    assert 0 < off <= float(note.split("up to ")[1].split()[0])
    assert off < 0.05


def test_how_far_a_value_may_be_off_holds_for_any_distribution():
    generator = np.random.default_rng(0)
    for scale in (0.1, 1.0, 5.0):
        for temperature in (0.3, 0.7, 0.95):
            logits = scale * generator.standard_normal(300)
            values = logits - np.log(np.exp(logits).sum())
            token = int(generator.integers(300))
            shown = {int(one): float(values[one]) for one in [*np.argsort(-values)[:10], token]}
            value, off = at_temperature(shown, token, temperature)
            exact = values[token] / temperature - np.log(np.exp(values / temperature).sum())
            assert abs(value - exact) <= off + 1e-12


def test_a_response_that_the_server_cuts_otherwise_is_not_weighed_but_counted(weighing, checkpoint, processor):
    weighing.cut = True
    engine = engine_on(weighing, checkpoint)
    (rows,) = weighed(engine, given(processor, "a cup"), temperature=1.0).values()
    assert np.isnan(rows).all()
    assert engine.notes["responses not weighed"] == "1"


def test_a_response_that_the_server_refuses_is_not_weighed_but_counted(weighing, checkpoint, processor):
    def refuse(body, count):
        return Reply({"error": {"message": "no"}}, 400) if "two" in body["messages"][-1]["content"] else None

    weighing.behave = refuse
    engine = engine_on(weighing, checkpoint)
    (rows,) = weighed(engine, given(processor, "a cup", "two cups"), temperature=1.0).values()
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1]).all()
    assert engine.notes["responses not weighed"] == "1"


def test_what_cannot_be_weighed_is_one_clear_message(weighing, checkpoint, processor):
    item = given(processor, "a cup")
    with pytest.raises(UserError, match=r"temperature 1\.2 is above 1"):
        weighed(engine_on(weighing, checkpoint), item, temperature=1.2)
    with pytest.raises(UserError, match="the checkpoint does not lie here"):
        weighed(engine_on(weighing, None), item, temperature=1.0)
    plain = StubServer()
    with pytest.raises(UserError, match="gives no prompt log-probabilities"):
        weighed(engine_on(plain, checkpoint), item, temperature=1.0)
    plain.stop()
