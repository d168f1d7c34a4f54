"""An answer of a server as it grows, and `align chat` with a model that is served."""

import itertools

import pytest
from PIL import Image
from typer.testing import CliRunner

from align.chat.answers import Chat, Exchange
from align.cli import app
from align.engines.base import SamplingSettings
from align.engines.streaming import Stopped
from align.errors import UserError
from tests.engines.conftest import collect
from tests.engines.stub_server import KEY, MODEL, Reply, events, said
from tests.engines.test_server import SETTINGS, ask_for, engine_on, expected, serve

__all__ = ["serve"]
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=16)


@pytest.mark.parametrize("has_n", [True, False])
def test_a_streamed_answer_grows_into_what_sampling_gives(serve, has_n):
    engine = engine_on(serve(has_n=has_n))
    (sampled,) = collect(engine, [ask_for(1)], SETTINGS).values()
    seen = []
    assert engine.stream(ask_for(1), SETTINGS, seen.append).texts == sampled.texts == seen[-1]
    assert len(seen) == 3 * len(sampled.texts[0].split())
    for before, after in itertools.pairwise(seen):
        assert sum(map(len, before)) < sum(map(len, after))
        assert all(new.startswith(old) for old, new in zip(before, after, strict=False))


def test_at_temperature_0_one_answer_stands_for_all(serve):
    server, seen = serve(), []
    engine_on(server).stream(ask_for(1), GREEDY, seen.append)
    assert server.num_requests == 1
    assert all(len(texts) == 3 and len(set(texts)) == 1 for texts in seen)


def test_a_server_that_does_not_stream_answers_all_the_same(serve):
    seen = []
    result = engine_on(serve(streams=False)).stream(ask_for(1), SETTINGS, seen.append)
    assert result.texts == expected(ask_for(1))
    assert seen == []


BROKEN = {
    "it ends in the middle": lambda texts: events(texts, num_events=2),
    "no choice ever comes": lambda texts: Reply(b"data: [DONE]\n\n", headers={"Content-Type": "text/event-stream"}),
    "an event is no JSON": lambda texts: Reply(b"data: {\n\n", headers={"Content-Type": "text/event-stream"}),
    "an event tells of an error": lambda texts: Reply(
        b'data: {"error": {"message": "out of memory"}}\n\n', headers={"Content-Type": "text/event-stream"}
    ),
    "an event has another form": lambda texts: Reply(
        b'data: {"choices": ["x"]}\n\n', headers={"Content-Type": "text/event-stream"}
    ),
    "the connection is cut": lambda texts: Reply(
        events(texts, num_events=2).body, headers={"Content-Type": "text/event-stream"}, claim_bytes=10_000
    ),
    "busy": lambda texts: Reply({"error": {"message": "try later"}}, 503),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_stream_begins_again(serve, how):
    def behave(body, count):
        return BROKEN[how]([said(body, index) for index in range(3)]) if count == 1 else None

    server, seen = serve(behave=behave), []
    result = engine_on(server).stream(ask_for(1), SETTINGS, seen.append)
    assert result.texts == expected(ask_for(1)) == seen[-1]
    assert server.num_requests == 2


def test_whoever_reads_along_can_stop_and_ask_again(serve):
    server, seen = serve(), []
    engine = engine_on(server)

    def stop(texts):
        seen.append(texts)
        raise Stopped

    with pytest.raises(Stopped):
        engine.stream(ask_for(1), SETTINGS, stop)
    assert len(seen) == 1
    assert server.num_requests == 1
    assert engine.stream(ask_for(2), SETTINGS, seen.append).texts == expected(ask_for(2))


def test_a_conversation_that_a_server_refuses_is_said_and_not_repeated(serve):
    server = serve(behave=lambda body, count: Reply({"error": {"message": "prompt too long"}}, 400))
    with pytest.raises(UserError, match="prompt too long"):
        engine_on(server).stream(ask_for(1), SETTINGS, lambda texts: None)
    assert server.num_requests == 1


def test_chat_talks_to_a_served_model_and_sends_the_whole_conversation(serve, tmp_path):
    server = serve()
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    chat = Chat(server.url)
    assert chat.model == MODEL
    first = chat.ask("What is it?", [tmp_path / "a.png"])
    *_, last = chat.answer([first, Exchange("And?")], GREEDY)
    assert last.texts == ("And? -> 0",)
    assert last.cut == (False,)
    (asked,) = server.asked
    assert [part["type"] for part in asked["messages"][0]["content"]] == ["image_url", "text"]
    assert asked["stream"]


def test_of_several_served_models_the_address_names_one(serve):
    server = serve(models=("policy-0", "policy-1"))
    assert Chat(f"{server.url}#policy-1").model == "policy-1"
    with pytest.raises(UserError, match="say which is meant"):
        Chat(server.url)
    with pytest.raises(UserError, match="name it as http"):
        Chat("http://")
    server.stop()
    with pytest.raises(UserError, match="no server answers"):
        Chat(server.url)


def test_the_chat_command_takes_an_address_and_a_key(serve, monkeypatch):
    server = serve(key=KEY)
    monkeypatch.setenv("THE_KEY", KEY)
    done = CliRunner().invoke(app, ["chat", server.url, "-q", "Who?", "--api-key-env", "THE_KEY"])
    assert done.output == "Who? -> 0\n"
